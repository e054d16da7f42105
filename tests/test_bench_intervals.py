"""What a benchmark's rounds leave open: intervals that hold the truth, undecided bars, a column a processor."""

import numpy as np
import pytest
from ppg_fast.bench import intervals, render, result_file, tables

ROUNDS = 15


def entry(seconds, name="ppg_fast cpu, in place", group="a case", kind="ours", **params):
    stats = {"median": float(np.median(seconds)), "data": list(map(float, seconds)), "rounds": len(seconds)}
    return {
        "group": group,
        "param": name,
        "params": {"op": "policy_loss", "device": "cpu", **params},
        "extra_info": {"kind": kind, "correct": True},
        "stats": stats,
    }


def ratio(above, below):
    return intervals.over(intervals.medians(above), intervals.medians(below))


def test_the_interval_holds_the_true_ratio_nineteen_times_in_twenty():
    """Noise as that of a busy machine: skewed, the same in both contestants of a round and some of their own."""
    noise, held, runs = np.random.default_rng(0), 0, 200
    for number in range(runs):
        common = noise.exponential(1.0, ROUNDS)
        above, below = (s * (1 + common) * noise.lognormal(0, 0.05, ROUNDS) for s in (1.2, 1.0))
        low, high = intervals.interval(ratio(entry(above, group=f"{number}"), entry(below, group=f"{number}")))
        held += low <= 1.2 <= high
    assert 0.9 * runs <= held, held


def test_what_slows_a_whole_round_widens_no_interval():
    common = np.random.default_rng(1).exponential(3.0, ROUNDS) + 1
    low, high = intervals.interval(ratio(entry(1.2 * common), entry(common)))
    assert (low, high) == pytest.approx((1.2, 1.2))
    apart = intervals.interval(ratio(entry(1.2 * common, group="another"), entry(common)))
    assert apart[0] < 1 < apart[1]


@pytest.mark.parametrize(
    ("above", "bar", "met"),
    [
        (np.linspace(0.8, 0.9, 15), 1.0, True),
        (np.linspace(1.1, 1.2, 15), 1.0, False),
        (np.linspace(0.9, 1.1, 15), 1.0, None),
        (np.full(15, 1.0), 1.0, True),  # at most
        (np.full(intervals.LEAST, 0.5), 1.0, True),
        (np.full(intervals.LEAST - 1, 0.5), 1.0, None),
    ],
)
def test_a_bar_is_met_missed_or_undecided(above, bar, met):
    found = ratio(entry(above), entry(np.ones(15), group="another"))
    assert found[0] == pytest.approx(np.median(above))
    assert intervals.verdict(found, bar) is met


def test_a_divisor_that_may_be_zero_leaves_no_interval():
    few = np.r_[np.full(8, 1.0), np.full(7, -1.0)]
    assert intervals.interval(ratio(entry(np.ones(15)), entry(few))) is None
    assert ratio(entry(np.ones(15)), entry(-few)) is None
    assert ratio(entry(np.ones(15)), entry(np.full(15, 2.0)))[0] == 0.5


def test_a_file_without_rounds_still_has_its_medians():
    old = entry(np.ones(15))
    del old["stats"]["data"]
    assert intervals.medians(old)[0] == 1
    assert intervals.interval(intervals.medians(old)) is None


def test_the_same_file_has_the_same_interval():
    noisy = np.random.default_rng(2).lognormal(0, 0.1, 15)
    first = intervals.interval(intervals.medians(entry(noisy)))
    intervals._medians.cache_clear()
    assert intervals.interval(intervals.medians(entry(noisy))) == first


def machine_of(brand, isa):
    return {"cpu": {"brand_raw": brand}, "ppg_fast_isa": isa}


@pytest.mark.parametrize(
    ("info", "words", "name"),
    [
        (
            machine_of("AMD EPYC (family 25 model 1)", "avx2"),
            "AMD EPYC (family 25 model 1), AVX2",
            "linear.cpu.amd-epyc-25-1",
        ),
        (
            machine_of("Intel(R) Xeon(R) Processor (family 6 model 207)", "avx512"),
            "Intel Xeon Processor (family 6 model 207), AVX-512",
            "linear.cpu.intel-xeon-6-207",
        ),
        (machine_of("", "baseline"), "", "linear.cpu.unknown"),
        (
            {**machine_of("AMD EPYC", "avx512"), "gpu": {"name": "NVIDIA H200"}},
            "NVIDIA H200",
            "linear.cpu.nvidia-h200",
        ),
    ],
)
def test_a_processor_has_a_name_and_files_of_its_own(info, words, name):
    assert result_file.processor(info) == words
    assert result_file.name_of("linear", "cpu", info) == name


def test_committed_times_lie_in_the_file_of_their_processor():
    for name, file in render.load(result_file.ROOT / render.FOLDER).items():
        op, device, place = (*name.split(".", 2), "", "")[:3]
        if place or file["benchmarks"]:
            assert name == result_file.name_of(op, device, file["machine_info"]), "rename it, and bring the other back"


def two_processors(first, second):
    """Results of one case on two processors: ours takes these seconds, memcpy 1."""
    infos = machine_of("AMD EPYC (family 25 model 1)", "avx2"), machine_of("AMD EPYC (family 25 model 17)", "avx512")
    case = {"dtype": "float32", "threads": 1, "allocator": "tuned", "active": 1.0, "zero": 0.0}
    case |= {"N": 2, "V": 32000, "D": 0, "variant": ""}
    results = {}
    for seconds, info in zip((first, second), infos, strict=True):
        pair = [entry(seconds, **case), entry(np.full(15, 1.0), "memcpy", kind="ceiling", **case)]
        pair.append(entry(np.full(15, 2.0), "eager PyTorch", kind="peer", **case))
        results[result_file.name_of("policy_loss", "cpu", info)] = {"machine_info": info, "benchmarks": pair}
    return results


def test_each_processor_has_its_column_of_the_aims():
    text = render.SECTIONS["aims"](two_processors(np.full(15, 1.0), np.linspace(1.0, 1.2, 15)))
    head, _, line = text.splitlines()[:3]
    assert head.endswith("| AMD EPYC (family 25 model 1), AVX2 | AMD EPYC (family 25 model 17), AVX-512 |")
    assert "| 1.10, AVX2 1.15 | 1.00 (1.00 to 1.00), yes | 1.10 (1.0" in line
    assert line.endswith("undecided |")


def test_a_peak_that_changes_from_process_to_process_is_undecided():
    results = two_processors(np.full(15, 1.0), np.full(15, 1.0))
    (name, file), _ = results.items()
    whole = {"N": 2048, "dtype": "float32", "active": 1.0, "zero": 0.0}
    sizes = {"ppg_fast cpu": ("ours", [90, 95, 99]), "a peer": ("peer", [94, 100, 110]), "a fat peer": ("peer", [500])}
    entries = []
    for who, (kind, peaks) in sizes.items():
        entries.append(entry(np.full(15, 1.0), who, kind=kind, **whole))
        entries[-1]["extra_info"] |= {"peak_extra_bytes": peaks[len(peaks) // 2], "peaks_extra_bytes": peaks}
    text = render.SECTIONS["aims"]({name.replace("policy_loss", "linear"): {**file, "benchmarks": entries}})
    row = "| its peak of memory, float32 / the leanest other's | 1.00 | {} |"
    assert row.format("0.95 (0.82 to 1.05), undecided") in text
    entries[0]["extra_info"]["peaks_extra_bytes"] = [90, 92]
    text = render.SECTIONS["aims"]({name.replace("policy_loss", "linear"): {**file, "benchmarks": entries}})
    assert row.format("0.95 (0.82 to 0.98), yes") in text


def test_calls_beside_a_busy_neighbour_say_nothing_of_arithmetic_to_memory():
    """Ours took 1.5 of memcpy while others had half of the core, and 1.0 while it was ours."""
    results = two_processors(np.full(15, 1.0), np.r_[np.full(9, 1.5), np.full(6, 1.0)])
    row = "| loss and gradient in place, float32, 1 thread / memcpy | 1.10, AVX2 1.15 |"
    assert f"{row} 1.00 (1.00 to 1.00), yes | 1.50 (1.00 to 1.50), undecided |" in render.SECTIONS["aims"](results)
    ours, memcpy, _ = list(results.values())[1]["benchmarks"]
    ours["extra_info"]["core_gflops"] = 9 * [50.0] + 6 * [95.0]
    memcpy["extra_info"]["core_gflops"] = 7 * [100.0] + 8 * [60.0]
    assert f"{row} 1.00 (1.00 to 1.00), yes | 1.00 (1.00 to 1.00), yes |" in render.SECTIONS["aims"](results)
    memcpy["extra_info"]["core_gflops"][:7] = 7 * [106.0]  # so that no call of ours had the core to itself
    assert f"{row} 1.00 (1.00 to 1.00), yes | 1.50 (no interval), undecided |" in render.SECTIONS["aims"](results)


def test_half_the_lanes_have_a_bar_of_their_own():
    text = render.SECTIONS["aims"](two_processors(np.full(15, 1.12), np.full(15, 1.12)))
    assert "| 1.12 (1.12 to 1.12), yes | 1.12 (1.12 to 1.12), **no** |" in text.splitlines()[2]


def test_the_front_page_takes_the_processor_where_we_gain_least():
    text = render.SECTIONS["summary"](two_processors(np.full(15, 0.5), np.full(15, 1.0)))
    assert "2.00 x" in text
    assert "4.00 x" not in text
    assert "model 17" in text


def test_a_table_says_where_two_cannot_be_told_apart():
    ours = entry(np.linspace(0.9, 1.1, 15))

    def said(seconds):
        return tables.speedup(entry(seconds, kind="peer"), ours)

    assert said(np.linspace(1.1, 0.9, 15)) == "1.00 x (undecided)"
    assert said(np.full(15, 2.0)) == "2.00 x"
    assert said([2.0]) == "2.00 x (no interval)"
