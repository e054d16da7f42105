"""Finished comparisons become a results file, charts and sections of the documents."""

import json

import pytest
from ppg_fast.bench import policy_classes, render

from ppg_fast.compare.command import main


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two comparisons of different problems, stored together."""
    folder = tmp_path_factory.mktemp("stored")
    shared = ["--version", "tabular", "--policy-classes", "greedy,full,auto", "--max-steps", "4", "--seeds", "2"]
    for name, problems in (("made", "plan"), ("drawn", "drawn:0..2")):
        assert main([*shared, "--problem", problems, "--output-dir", str(folder / name)]) == 0
    policy_classes.main([str(folder / "made"), str(folder / "drawn"), "--output", str(folder)])
    return folder, render.load(folder)


def test_a_problem_that_was_made_has_its_row_and_its_charts(stored):
    folder, results = stored
    assert "| plan, tabular | 2 | full |" in render.SECTIONS["policy_classes"](results)
    text = render.SECTIONS["policy_class_problems"](results)
    assert "### plan: made for full" in text
    for name in ("policy_classes.plan.svg", "policy_classes.plan.gradients.svg"):
        assert f"({'../bench/results/' + name})" in text
        assert (folder / name).read_text().startswith("<?xml")
    assert render.SECTIONS["policy_class_logs"](results) == render.NOT_MEASURED


def test_a_table_has_the_same_columns_on_the_page_and_in_the_documents(stored):
    folder, results = stored
    (p,) = json.loads((folder / "made/compare.json").read_text())["problems"]
    page, text = (folder / "made/report.html").read_text(), render.SECTIONS["policy_class_problems"](results)
    for name, c in p["classes"].items():
        g = p["gradient"].get(name, {})
        level = "not reached" if c["level_samples"] is None else f"{c['level_samples']:,.0f}"
        row = [name, *(f"{c[k]['mean']:.2f} ± {c[k]['std']:.2f}" for k in ("final", "area"))]
        row += [f"{level} ({c['level_reached']}/2)"]
        row += [f"{g[k]:.3f}" if k in g else "" for k in ("variance", "bias", "cosine", "alignment")]
        assert f"<tr{' class=own' * (name == 'full')}><td>{'</td><td>'.join(row)}</td></tr>" in page
        assert f"| {' | '.join(row)} |" in text


def test_drawn_problems_have_one_table_and_one_chart_together(stored):
    folder, results = stored
    text = render.SECTIONS["policy_class_across"](results)
    assert "**3 drawn problems, tabular, seeds: 2**" in text
    assert "(../bench/results/policy_classes.drawn.tabular.svg)" in text
    assert (folder / "policy_classes.drawn.tabular.svg").exists()
    assert "drawn:" not in render.SECTIONS["policy_class_problems"](results)
    stored_problems = results["policy_classes.cpu"]["problems"]
    assert [p["problem"] for p in stored_problems] == ["plan"]


def test_rivals_have_a_table_for_each_kind_of_noise(tmp_path):
    """Shares, how far they are from full planning, and the worst problem of all beside them."""
    flags = ["--version", "tabular", "--policy-classes", "greedy,full,gae:0.5", "--max-steps", "4", "--seeds", "2"]
    runs = []
    for name, more in {
        "made": ["--problem", "plan,immediate"],
        "drawn": ["--problem", "drawn:0..1"],
        "review": ["--problem", "review:late,review:moody", "--shared-noise"],
    }.items():
        runs.append(tmp_path / name)
        assert main([*flags, *more, "--output-dir", str(runs[-1])]) == 0
    policy_classes.main([*map(str, runs), "--rivals", "--output", str(tmp_path)])
    text = render.SECTIONS["credit_rivals"](render.load(tmp_path))
    own, shared = text.split("**Noise that a group shares**")
    assert "|  | 2 made | 2 drawn | minus full on its worst problem |" in own.split("**The problem's noise**")[1]
    assert "|  | 2 by a reviewer | minus full on its worst problem |" in shared
    of = [json.loads((run / "compare.json").read_text())["across"][0]["classes"] for run in runs]
    for arm in ("greedy", "gae:0.5"):
        cells = []
        for entry in of[:2]:
            paired = entry[arm]["minus_full"]
            cells.append(f"{entry[arm]['mean']:.1%} ({100 * paired['mean']:+.1f} ± {100 * paired['error']:.1f})")
        worst = min((entry[arm]["least_minus_full"] for entry in of[:2]), key=lambda d: d["mean"])
        cells.append(f"{worst['mean']:+.1%} ± {worst['error']:.1%}, {worst['problem']}")
        assert f"| {arm} | {' | '.join(cells)} |" in own
    assert f"| full | {of[0]['full']['mean']:.1%} | {of[1]['full']['mean']:.1%} |  |" in own
    results = render.load(tmp_path)
    results["credit_rivals.cpu"]["across"][1]["classes"].pop("greedy")  # not trained on these
    line = next(x for x in render.SECTIONS["credit_rivals"](results).splitlines() if x.startswith("| greedy |"))
    assert line.split("|")[3].strip() == ""


def test_losses_have_a_file_and_a_table_of_their_own(tmp_path):
    flags = ["--version", "tabular", "--policy-classes", "full", "--max-steps", "4", "--seeds", "2", "--offline", "64"]
    flags += ["--problem", "plan", "--loss-type", "reinforce,soft_q", "--noise", "0"]
    assert main([*flags, "--output-dir", str(tmp_path / "run")]) == 0
    policy_classes.main(["--losses", str(tmp_path / "run"), "--output", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["soft_q_study.cpu.json"]
    text = render.SECTIONS["soft_q_study"](render.load(tmp_path))
    assert (
        "**plan, tabular: 64 dialogues of the start, 0 times its noise; beta 0.1, 4 steps, seeds: 2** (best 8)" in text
    )
    (p,) = json.loads((tmp_path / "run/compare.json").read_text())["problems"]
    for arm in ("full", "full by soft_q"):
        c = p["classes"][arm]
        row = f"| {arm} | {c['mean'][0]:.2f} | {c['area']['mean']:.2f} ± {c['area']['std']:.2f} |"
        assert f"{row} {c['final']['mean']:.2f} ± {c['final']['std']:.2f} | {max(c['drop']['each']):.2f} |" in text
    assert f"- {p['verdict'][0]}" in text


def test_what_holds_a_loss_back_is_a_row_for_each_setting(tmp_path):
    flags = ["--version", "tabular", "--policy-classes", "full", "--max-steps", "4", "--seeds", "2", "--offline", "64"]
    flags += ["--problem", "immediate", "--loss-type", "reinforce,soft_q"]
    for name, more in (("plain", []), ("tuned", ["--tune", "1", "--beta", "0.02"])):
        assert main([*flags, *more, "--output-dir", str(tmp_path / name)]) == 0
    policy_classes.main(["--limits", *(str(tmp_path / n) for n in ("plain", "tuned")), "--output", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["soft_q_limits.cpu.json"]
    rows = render.SECTIONS["soft_q_limits"](render.load(tmp_path)).splitlines()[2:]
    assert rows[0].startswith("| full | 0.1 | 4 | 0.1, 0.1 | 12.00 |")
    (p,) = json.loads((tmp_path / "tuned/compare.json").read_text())["problems"]
    soft_q, plain = p["classes"]["full by soft_q"], p["classes"]["full"]
    rates = f"{soft_q['learning_rate']['mean']:g}, {plain['learning_rate']['mean']:g}"
    ends = f"{soft_q['soft_optimum']['mean']:.2f} | {soft_q['soft_optimum_of_log']['mean']:.2f}"
    d = [one - other for one, other in zip(soft_q["final"]["each"], plain["final"]["each"], strict=True)]
    bar = "met" if sum(d) / 2 >= -2 * abs(d[0] - d[1]) / 2 else "missed"
    assert rows[1].endswith(f"| {bar} |")
    assert rows[1].startswith(f"| full | 0.02 | 4 | {rates} | {ends} | {soft_q['final']['mean']:.2f} |")


def test_the_same_comparison_makes_the_same_files(stored, tmp_path):
    folder, _ = stored
    policy_classes.main([str(folder / "made"), str(folder / "drawn"), "--output", str(tmp_path)])
    charts = sorted(p.name for p in tmp_path.glob("*.svg"))
    assert charts == sorted(p.name for p in folder.glob("*.svg"))
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in charts)
    one, other = (render.load(f)["policy_classes.cpu"] for f in (folder, tmp_path))
    assert [one[k] for k in ("problems", "across", "logs")] == [other[k] for k in ("problems", "across", "logs")]
