"""The table of a real server beside the trainer."""

from .tables import NOT_MEASURED, Results, of, table


def agreement_section(results: Results) -> str:
    """How far the server's log-probs are from the trainer's, of the same tokens and weights."""
    text = ""
    for device, file in of(results, "llama_server"):
        rows = [
            (case["server"], case["tokens"], case["asked_one_by_one"], f"{case['mean']:.1e}", f"{case['max']:.1e}")
            for case in file["agreement"]
        ]
        heads = (f"llama.cpp ({device}, {file['ppg_fast']['server']}) serves", "tokens", "asked for by themselves")
        text += table((*heads, "mean difference, nats", "largest"), (map(str, row) for row in rows))
    return text or NOT_MEASURED
