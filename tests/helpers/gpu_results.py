"""Results of a GPU run that are made up, of round numbers."""

from ppg_fast.bench.gpu import store


def entry(op, provider, median, kind="peer", **params):
    case = {
        "op": op,
        "N": 8192,
        "V": 128256,
        "D": 0,
        "dtype": "bfloat16",
        "active": 1.0,
        "zero": 0.0,
        "variant": "",
        "device": "cuda",
    }
    case |= {"threads": 1, "allocator": "default", "provider": provider, **params}
    stats = {"median": median, "p20": median, "p80": median, "min": median, "rounds": 5}
    group = f"{op} {case['V']} {case['active']}"
    return {
        "group": group,
        "param": provider,
        "params": case,
        "part": "bench",
        "stats": stats,
        "extra_info": {"kind": kind, "correct": True},
    }


def synthetic(when, commit, **parts):
    file = store.header("make gpu", commit)
    file["datetime"] = when
    file["parts"] = {name: {"status": "passed", "seconds": 1.0, "results": results} for name, results in parts.items()}
    return file


def measured():
    """A run made up of round numbers."""
    bare = entry("linear", "three bare GEMMs", 0.033, "ceiling", D=4096)
    head = entry("linear", "ppg_fast cuda", 0.036, "ours", D=4096)
    head["extra_info"] |= {"peak_extra_bytes": 4.0e9, "chunk_bytes": 8192 * 128256 * 2}
    file = synthetic(
        "2026-01-01T00:00:00+00:00",
        "c" * 40,
        dram=[
            {
                "op": "policy_loss",
                "N": 8192,
                "V": 128256,
                "read": 2e9,
                "write": 2e9,
                "bytes": 4.1e9,
                "over_least": 1.025,
            }
        ],
        counts=[{"path": "rewards and logits to loss and dlogits", "launches": ["a", "b", "c"], "syncs": 0}],
        bench=[{"chunk_rows": 4096, "stats": {"median": 0.035}, "share_of_bare_gemms": 0.94}],
        steps=[
            {
                "model": "Qwen3-8B",
                "tokens": 262144,
                "offload": True,
                "provider": "ppg_fast cuda",
                "fits": True,
                "seconds": 60.0,
                "loss_seconds": 3.0,
                "peak_bytes": 2**36,
            },
            {
                "model": "Qwen3-8B",
                "tokens": 32768,
                "offload": False,
                "provider": "eager PyTorch",
                "fits": False,
                "reason": "out of memory",
            },
        ],
        plans=[
            {
                "plan": {"cluster": 4, "threads": 256, "slots": 5},
                "N": 8192,
                "V": 128256,
                "full": 100,
                "launched": True,
                "ms": 1.1,
                "copy_ms": 1.0,
                "share_of_copy": 0.91,
                "difference": 1e-6,
            }
        ],
    )
    file["benchmarks"] = [
        entry("policy_loss", "copy", 0.0010, "ceiling"),
        entry("policy_loss", "ppg_fast cuda, in place", 0.0011, "ours"),
        entry("policy_loss", "torch.compile", 0.0022), entry("policy_loss", "quack cross-entropy", 0.00105), bare, head,
        entry("linear", "ppg_fast cuda", 0.0099, "ours", D=4096, active=0.25),
        entry("logprobs", "read (sum)", 0.00050, "ceiling"),
        entry("logprobs", "ppg_fast cuda, with entropy", 0.00060, "ours"),
    ]  # fmt: skip
    return file
