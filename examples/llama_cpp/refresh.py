"""Have llama.cpp's server load the policy as it is now: it cannot change weights while it runs, so its file is written
anew and it is started again.

The server runs in a loop, which also brings it back where it dies; `start.gguf` is the model that training starts from:

    cp start.gguf policy.gguf
    while :; do llama-server -m policy.gguf --port 8080 --ctx-size 8192 & echo $! > server.pid; wait $!; sleep 1; done

    ppg-fast train --model start/ --prompts prompts.jsonl --sampler http://localhost:8080/v1 --sampler-refresh \
        "python examples/llama_cpp/refresh.py {folder} --like start.gguf --gguf policy.gguf --pid server.pid"

needs `pip install gguf`. For an architecture beside Llama's (SmolLM2, Llama 3, Mistral) take llama.cpp's own
`convert_hf_to_gguf.py` in its place.
"""

import argparse
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

TYPES = {"f32": (np.float32, gguf.LlamaFileType.ALL_F32), "f16": (np.float16, gguf.LlamaFileType.MOSTLY_F16)}


def write_gguf(folder: Path, like: Path, out: Path, kind: str = "f32") -> None:
    """The weights of ``folder`` with the metadata of ``like``, as a whole file under its name or not at all."""
    reader = gguf.GGUFReader(like)
    said = {name: field.contents() for name, field in reader.fields.items()}
    if said["general.architecture"] != "llama":
        raise SystemExit(f"{like} must be of the architecture llama, got {said['general.architecture']}")
    dtype, file_type = TYPES[kind]
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, said[name], field.types[0], sub_type=sub)
    writer.add_file_type(file_type)
    weights = _weights(folder, said)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if tensor.name not in weights or weights[tensor.name].shape != shape:
            found = weights[tensor.name].shape if tensor.name in weights else "none"
            raise SystemExit(f"{folder} must hold {tensor.name} of shape {shape}, as {like} does, got {found}")
        writer.add_tensor(tensor.name, weights[tensor.name].astype(dtype if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, out)


def _weights(folder: Path, said: dict) -> dict[str, np.ndarray]:
    """By their names in GGUF, float32. llama.cpp turns neighbouring pairs where transformers turns halves, so the rows
    of queries and keys change places."""
    heads = {"attn_q": said["llama.attention.head_count"], "attn_k": said["llama.attention.head_count_kv"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, said["llama.block_count"])
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for key in saved.keys():  # noqa: SIM118, it is no mapping
                name = names.get_name(key, try_suffixes=(".weight", ".bias"))
                weight = saved.get_tensor(key).float().numpy()
                if head := heads.get(str(name).split(".")[-2]):
                    weight = weight.reshape(head, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
                weights[name] = weight
    return weights


def restart(pid: Path, url: str, seconds: float) -> None:
    """End the server of ``pid`` and wait until its loop has brought up another, which answers."""
    before = pid.read_text()
    try:
        os.kill(int(before), signal.SIGTERM)
    except ProcessLookupError:
        print(f"{pid} names process {before.strip()}, which is gone: waiting for the next")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
        try:
            if pid.read_text() not in ("", before) and urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                return
        except (urllib.error.URLError, OSError):  # not there yet, or still loading
            continue
    raise SystemExit(f"the server at {url} must be back within {seconds:g} s (--seconds), does its loop still run?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what the trainer saved")
    parser.add_argument("--like", type=Path, required=True, help="a GGUF file of the same model: metadata, tokenizer")
    parser.add_argument("--gguf", type=Path, required=True, help="the file that the server serves, written anew")
    parser.add_argument("--type", choices=list(TYPES), default="f32", help="of the matrices")
    parser.add_argument("--pid", type=Path, help="a file with the server's process id; default: no server is restarted")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the server")
    parser.add_argument("--seconds", type=float, default=300.0, help="to wait for it")
    arguments = parser.parse_args()
    write_gguf(arguments.folder, arguments.like, arguments.gguf, arguments.type)
    if arguments.pid:
        restart(arguments.pid, arguments.url, arguments.seconds)


if __name__ == "__main__":
    main()
