"""Which text a step trains on: GKD's draws, DistiLLM's threshold and buffer; whole runs of decisions are repeatable."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_kd.data.random_numbers import uniform
from megatron_kd.training.methods.distillm import DistiLLMSource, ReplayBuffer
from megatron_kd.training.methods.generated_text import Texts, own_rows
from megatron_kd.training.methods.gkd import GKDSource
from megatron_kd.training.methods.method_table import DistiLLMConfig, GKDConfig
from megatron_kd.training.methods.pretraining import PretrainingBeside
from megatron_kd.training.methods.source import DatasetSource, Place, StepBatches
from megatron_kd.training.objective import token_weights
from tests.unit.training.methods.made_batches import micro_batch

ONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
GROUPS = SimpleNamespace(dp=ONE)


def texts(count, first=0):
    """Sequences of one id each, so that they can be told apart."""
    ids = torch.arange(first, first + count)
    return Texts(ids.unsqueeze(1).expand(count, 6).clone(), torch.full((count,), 6), torch.full((count,), 2))


class Writer:
    """Writes sequences that are numbered through, and remembers who was asked."""

    def __init__(self):
        self.asked, self.count = [], 0

    def write(self, policy, batches, global_batch, stream):
        self.asked.append((policy, global_batch, stream))
        made = texts(4, 4 * self.count)
        self.count += 1
        return self.cut(made, batches)

    def cut(self, made, batches):
        return [micro_batch(made)]


def dataset_batches():
    return [micro_batch(texts(4, 900))]


def gkd(**keys):
    writer = Writer()
    policies = {"student": "student", "teacher": "teacher"}
    source = GKDSource(GKDConfig(**keys), writer, policies, seed=3, global_batch_size=4)
    return source, writer


@pytest.mark.parametrize(("fraction", "seq_kd"), [(0.0, False), (0.3, False), (0.7, True), (1.0, True)])
def test_gkd_takes_the_student_as_often_as_told(fraction, seq_kd):
    source, _ = gkd(student_fraction=fraction, seq_kd=seq_kd)
    origins = [source.origin(position) for position in range(2000)]
    assert abs(origins.count("student") / 2000 - fraction) < 0.04
    assert set(origins) - {"student"} <= ({"teacher"} if seq_kd else {"dataset"})
    assert fraction not in (0.0, 1.0) or len(set(origins)) == 1


def test_gkd_asks_the_right_writer_and_counts():
    source, writer = gkd(student_fraction=0.5, seq_kd=True)
    origins = [source.batches(Place(n, 20, n), dataset_batches()).facts["origin"] for n in range(20)]
    assert [policy for policy, *_ in writer.asked] == origins
    assert [batch for _, batch, _ in writer.asked] == list(range(20))
    assert source.counts.student == 4 * origins.count("student") > 0
    again, _ = gkd(student_fraction=0.5, seq_kd=True)
    again.restore(source.state())
    assert again.counts == source.counts


def distillm(**keys):
    writer = Writer()
    source = DistiLLMSource(DistiLLMConfig(**keys), writer, "student", GROUPS, seed=3, global_batch_size=4)
    return source, writer


def test_threshold_moves_only_when_the_loss_has_risen_by_the_margin():
    source, _ = distillm(threshold_step=0.4)
    thresholds = []
    for loss in (3.0, 2.5, 3.05, 3.2, 3.25, 3.31, 3.32, 9.0, 2.0, 8.9, 9.2):
        source.after_evaluation(loss)
        thresholds.append(source.threshold)
    # the reference stays 3.0 until 3.2 moves it; then 3.31 does (3.25 is below 3.2 + 0.1), then 9.0, then 9.2
    assert thresholds == pytest.approx([0, 0, 0, 0.4, 0.4, 0.8, 0.8, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("schedule", "expected"), [("decreasing", (0.8, 0.2)), ("constant", (0.4, 0.4)), ("increasing", (0.0, 0.6))]
)
def test_schedules_of_new_text(schedule, expected):
    source, _ = distillm(initial_threshold=0.8, replay_schedule=schedule)
    found = source.fresh_probability(Place(0, 100, 0)), source.fresh_probability(Place(75, 100, 75))
    assert found == pytest.approx(expected)


def test_decisions_follow_the_written_rule():
    source, writer = distillm(initial_threshold=0.7, replay_capacity=8, replay_schedule="decreasing")
    held = 0
    for step in range(60):
        draw = uniform(3, "distillm", step)
        fresh = draw < 0.7 * (1 - step / 60) or (draw < 0.7 and held < 8)
        expected = "student" if fresh else "replay" if draw < 0.7 else "dataset"
        made = source.batches(Place(step, 60, step), dataset_batches())
        assert made.facts["origin"] == expected, step
        held = min(8, held + 4 * (expected == "student"))
        assert len(source.buffer) == held
        ids = made.batches[0].tokens[:, 0].tolist()
        if expected == "replay":
            assert all(4 * writer.count - 8 <= number < 4 * writer.count for number in ids) and len(set(ids)) == 4
        assert expected != "dataset" or ids == [900, 901, 902, 903]
    assert source.counts.student == 4 * writer.count


def test_distillm_goes_on_from_its_state():
    places = [Place(n, 60, n) for n in range(60)]
    whole, _ = distillm(initial_threshold=0.7, replay_capacity=8)
    first, writer = distillm(initial_threshold=0.7, replay_capacity=8)
    expected = [whole.batches(place, dataset_batches()) for place in places]
    for place in places[:30]:
        first.batches(place, dataset_batches())
    first.after_evaluation(2.0)
    second, second_writer = distillm(replay_capacity=8)
    second_writer.count = writer.count
    second.restore(first.state())
    assert second._reference_loss == 2.0
    for place, one in zip(places[30:], expected[30:]):
        other = second.batches(place, dataset_batches())
        assert other.facts == one.facts
        assert torch.equal(other.batches[0].tokens, one.batches[0].tokens)


def test_buffer_is_first_in_first_out_and_draws_without_replacement():
    buffer = ReplayBuffer(10, seed=1)
    with pytest.raises(ValueError, match="buffer of 0"):
        buffer.draw(1, 0)
    for start in range(0, 16, 4):
        buffer.push(texts(4, start))
    assert buffer.is_full and sorted(buffer.draw(10, 0).tokens[:, 0].tolist()) == list(range(6, 16))
    drawn = [tuple(buffer.draw(4, number).tokens[:, 0].tolist()) for number in range(300)]
    assert all(len(set(row)) == 4 for row in drawn) and len(set(drawn)) > 250
    frequencies = np.bincount(np.array(drawn).ravel(), minlength=16)[6:] / 300
    assert np.abs(frequencies - 0.4).max() < 0.12
    other = ReplayBuffer(10, seed=1)
    other.restore(buffer.state())
    assert torch.equal(other.draw(4, 7).tokens, buffer.draw(4, 7).tokens)


def test_rows_of_a_data_parallel_rank():
    """Micro-batch i of rank r starts at row (i · ranks + r) · b of the global batch."""
    for rank, expected in ((0, [0, 1, 4, 5]), (1, [2, 3, 6, 7])):
        groups = SimpleNamespace(dp=SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank))
        assert own_rows(texts(8), 2, groups).tokens[:, 0].tolist() == expected


def test_mask_of_a_generated_batch():
    made = micro_batch(
        Texts(
            torch.tensor([[5, 6, 7, 8, 0, 0], [5, 6, 7, 8, 9, 4], [5, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 4]]),
            torch.tensor([4, 6, 2, 6]),
            torch.tensor([2, 5, 1, 6]),
        )
    )
    assert made.loss_mask.tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert made.tokens.tolist()[0] == [5, 6, 7, 0, 0] and made.labels.tolist()[0] == [6, 7, 8, 0, 0]
    there = made.to("meta")
    assert there.payload.texts.tokens.device.type == "meta" and there.key == made.key


class Main:
    """A source that gives the same batch whatever the dataset's."""

    after_evaluation = state = restore = None

    def __init__(self, batch):
        self.batch = batch

    def batches(self, place, dataset):
        return StepBatches([self.batch])


def token_count(batch):
    return token_weights(batch, "token")[1]


def test_pretraining_beside_is_scaled_to_its_own_mean():
    """Divided by the main batches' count, the scaled sum must be the weight times the dataset's mean."""
    (main,), dataset = dataset_batches(), [micro_batch(texts(4))]
    main.loss_mask[:, 2:] = 0
    made = PretrainingBeside(Main(main), 0.3, GROUPS, token_count, token_count).batches(Place(0, 1, 0), dataset)
    assert made.batches[0] is main and len(made.batches) == 2
    losses = torch.rand(dataset[0].loss_mask.shape)
    summed = (losses * dataset[0].loss_mask).sum() * made.batches[1].payload.scale
    mean = (losses * dataset[0].loss_mask).sum() / dataset[0].loss_mask.sum()
    assert float(summed / main.loss_mask.sum()) == pytest.approx(0.3 * float(mean))


def test_an_empty_main_batch_leaves_the_scale_finite():
    (main,) = dataset_batches()
    main.loss_mask.zero_()
    source = PretrainingBeside(Main(main), 1.0, GROUPS, token_count, token_count)
    assert np.isfinite(source.batches(Place(0, 1, 0), dataset_batches()).batches[1].payload.scale)


def test_the_dataset_source_gives_what_it_is_given():
    batches = dataset_batches()
    made = DatasetSource().batches(Place(0, 1, 0), batches)
    assert made.batches[0] is batches[0] and made.scheduled and not DatasetSource().state()
