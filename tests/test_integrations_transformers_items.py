"""`num_items_in_batch` of transformers' Trainer and what the loss weighs: one number, or one line of error."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers_case import V, gradients, single_thread, tiny

import ppg_fast as ppg
from ppg_fast.integrations.transformers import patch

one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)
B, L = 2, 9
IDS = torch.randint(2, V, (B, L), generator=torch.Generator().manual_seed(8))
LABELS = IDS.masked_fill(torch.arange(L) < 2, -100)
A = torch.randn(B, L, generator=torch.Generator().manual_seed(9)) + 2.0
MASK = (torch.arange(L) % 3 != 0).long().expand(B, L).clone()
TURN_IDS = torch.where(torch.arange(L) < 4, -1, torch.arange(L) // 6).expand(B, L).clone()


def by_hand(active, credit):
    """REINFORCE on the active tokens (B, L), divided by their number: from the logits, in float64."""
    scores = tiny().double()(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    taken = scores.gather(-1, IDS[:, 1:, None])[..., 0]
    return -(taken * credit[:, 1:])[active[:, 1:]].sum() / active[:, 1:].sum()


DROPPED = {
    "loss_mask": ({"advantages": A, "loss_mask": MASK}, (LABELS != -100) & (MASK == 1), A),
    "a boolean loss_mask": ({"advantages": A, "loss_mask": MASK == 1}, (LABELS != -100) & (MASK == 1), A),
    "turn_ids": (
        {"turn_advantages": A[:, :2], "turn_ids": TURN_IDS}, TURN_IDS >= 0, A[:, :2].gather(1, TURN_IDS.clamp(min=0)),
    ),
    "both": (
        {"turn_advantages": A[:, :2], "turn_ids": TURN_IDS, "loss_mask": MASK}, (TURN_IDS >= 0) & (MASK == 1),
        A[:, :2].gather(1, TURN_IDS.clamp(min=0)),
    ),
}  # fmt: skip
COUNTED = int((LABELS[:, 1:] != -100).sum())
REINFORCE = ppg.PolicyLossSpec("reinforce")


@pytest.mark.parametrize(
    "items", [COUNTED, torch.tensor(COUNTED), torch.tensor([[COUNTED]])], ids=lambda i: str(type(i))
)
@pytest.mark.parametrize("case", DROPPED)
def test_a_window_of_one_call_is_divided_by_what_it_trains(case, items):
    given, active, credit = DROPPED[case]
    with patch(tiny(), spec=REINFORCE) as patched:
        out = patched.model(input_ids=IDS, labels=LABELS, num_items_in_batch=items, **given)
    assert active[:, 1:].sum() < COUNTED
    torch.testing.assert_close(out.loss.double(), by_hand(active, credit), rtol=1e-5, atol=1e-5)


def test_shifted_labels_are_counted_where_they_stand():
    given = {"advantages": A.roll(-1, 1), "loss_mask": MASK.roll(-1, 1)}
    shifted = torch.cat([LABELS[:, 1:], torch.full((B, 1), -100)], 1)
    with patch(tiny(), spec=REINFORCE) as patched:
        out = patched.model(input_ids=IDS, shift_labels=shifted, num_items_in_batch=COUNTED, **given)
    expected = by_hand((LABELS != -100) & (MASK == 1), A)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_the_bounds_of_packed_dialogues_are_not_counted(shifted):
    """Two dialogues of 4 and 5 tokens whose labels go over the bound."""
    model, ids = tiny(), IDS[:1]
    labels = {"shift_labels": torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)} if shifted else {"labels": ids}
    bounds, positions = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    logits = [model.double()(input_ids=part).logits[0, :-1].log_softmax(-1) for part in (ids[:, :4], ids[:, 4:])]
    taken = [
        scores.gather(-1, part[0, 1:, None]) for scores, part in zip(logits, (ids[:, :4], ids[:, 4:]), strict=True)
    ]
    with patch(tiny(), spec=REINFORCE) as patched:
        call = {"input_ids": ids, "position_ids": positions, "cu_seqlens": bounds, **labels}
        out = patched.model(**call, advantages=torch.ones(1, L), num_items_in_batch=8)
        plain = patched.model(**call, num_items_in_batch=8)
    for loss in (out.loss, plain.loss):
        torch.testing.assert_close(loss.double(), -torch.cat(taken).sum() / 7, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", DROPPED)
def test_a_window_of_several_calls_is_refused_and_the_remedy_works(case):
    given, active, credit = DROPPED[case]
    with patch(tiny(), spec=REINFORCE) as patched:
        with pytest.raises(ValueError, match=r"labels that .* leave out must be -100, .*got \(14, ") as caught:
            patched.model(input_ids=IDS, labels=LABELS, num_items_in_batch=2 * COUNTED, **given)
        assert "\n" not in str(caught.value)
        window = 2 * int(active[:, 1:].sum())
        out = patched.model(input_ids=IDS, labels=LABELS.masked_fill(~active, -100), num_items_in_batch=window, **given)
        own = patched.model(input_ids=IDS, labels=LABELS, num_items_in_batch=99, normalizer=window, **given)
    for loss in (out.loss, own.loss):
        torch.testing.assert_close(2 * loss.double(), by_hand(active, credit), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("items", [0, torch.tensor(0), torch.tensor(0.0)])
@pytest.mark.parametrize("credit", [{}, {"advantages": A}, {"turn_advantages": A[:, :2], "turn_ids": TURN_IDS}])
def test_a_window_without_a_label_is_a_connected_zero(items, credit):
    model = tiny()
    with patch(model):
        out = model(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=items, **credit)
    assert out.loss == 0
    for name, gradient in gradients(out.loss, model).items():
        assert gradient is not None, name
        assert not gradient.any(), name


def test_a_window_that_masks_every_label_is_a_connected_zero():
    model = tiny()
    with patch(model):
        out = model(
            input_ids=IDS, labels=LABELS, advantages=A, loss_mask=torch.zeros_like(MASK), num_items_in_batch=COUNTED
        )
    assert out.loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients(out.loss, model).values())


class Rows(torch.utils.data.Dataset):
    """Rows 0 and 1 as above, rows 2 and 3 without a label."""

    def __init__(self, masked):
        self.masked = masked

    def __len__(self):
        return 4

    def __getitem__(self, i):
        labels, mask = (LABELS[i], MASK[i]) if i < 2 else (torch.full((L,), -100), torch.ones(L, dtype=torch.long))
        columns = {"input_ids": IDS[i % 2], "labels": labels, "advantages": A[i % 2]}
        return {**columns, "loss_mask": mask} if self.masked else columns


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained(folder, rows, steps):
    settings = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=steps, max_steps=2 // steps,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.0,
    )  # fmt: skip
    model = tiny()
    with patch(model, spec=REINFORCE):
        trainer = InOrder(model=model, args=settings, train_dataset=rows)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_takes_windows_with_dropped_labels_and_without_any(tmp_path):
    expected = [by_hand((LABELS != -100) & (MASK == 1), A).item(), 0.0]
    torch.testing.assert_close(trained(tmp_path, Rows(masked=True), 1), expected, rtol=1e-3, atol=1e-3)


def test_the_trainer_with_accumulation_takes_a_call_without_a_label(tmp_path):
    expected = [by_hand(LABELS != -100, A).item()]
    torch.testing.assert_close(trained(tmp_path, Rows(masked=False), 2), expected, rtol=1e-3, atol=1e-3)
    # the labels of the window are those of its first call
    expected = [by_hand((LABELS != -100) & (MASK == 1), A).item()]
    torch.testing.assert_close(trained(tmp_path, Rows(masked=True), 2), expected, rtol=1e-3, atol=1e-3)
