"""The ``teacher.*`` keys, those of ``cache_teacher_logits``, and the tables of what a teacher can be. Imports no torch.

    PLACEMENTS    where a teacher runs, or what it is read from
    CODECS        which ids of its distribution are kept
    PAYLOADS      what a remote teacher sends

A new placement is one module and one row. So is a new codec; a remote teacher can send it once ``PAYLOADS`` names it.
"""

import importlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_kd.models.architecture import LayerSpecName, Precision
from megatron_kd.parallel.layout import ParallelConfig

MOST_IDS = 32_767
"""The most ids per token, and the most draws."""


@dataclass(frozen=True)
class Placement:
    """A source of the teacher's knowledge.

    Attributes:
        module: defines ``build(config, run, groups)``, see :mod:`megatron_kd.teachers.placements`. None: no teacher.
        ranks_module: defines ``build_teacher_ranks(config, run, plan, batches)`` for a teacher that runs on
            ``teacher.num_ranks`` ranks of its own, the last ones of the world. None: it has none.
        source: the ``teacher.*`` key that says what the teacher is read from.
        required: ``teacher.*`` keys that must be given, each with what it is.
        runs_model: its forward passes are part of the run.
        is_sparse: it always gives a few ids per token; otherwise ``teacher.payload`` decides.
        takes_payload: ``teacher.payload`` may be set; a cache ignores it.
        knows_any_text: it can be asked about held-out and generated text too, not only about the chunks of one dataset.
        generates: it can generate text on the student's ranks.
    """

    module: str | None = None
    ranks_module: str | None = None
    source: str = "path"
    required: Mapping[str, str] = field(default_factory=dict)
    runs_model: bool = False
    is_sparse: bool = False
    takes_payload: bool = False
    knows_any_text: bool = True
    generates: bool = False


NO_TEACHER = "none"
PLACEMENTS: Mapping[str, Placement] = {
    NO_TEACHER: Placement(),
    "colocated": Placement(
        "megatron_kd.teachers.colocated",
        required={"path": "a checkpoint"},
        runs_model=True,
        generates=True,
    ),
    "remote": Placement(
        "megatron_kd.teachers.remote.student_side",
        "megatron_kd.teachers.remote.teacher_side",
        required={"path": "a checkpoint", "num_ranks": "how many of the ranks are its"},
        runs_model=True,
        takes_payload=True,
    ),
    "cached": Placement(
        "megatron_kd.teachers.cached",
        source="cache_path",
        required={"cache_path": "from cache_teacher_logits"},
        is_sparse=True,
        takes_payload=True,
        knows_any_text=False,
    ),
}


@dataclass(frozen=True)
class CodecRow:
    """A way to keep a few ids of the teacher's distribution.

    Attributes:
        path: the codec's class, a :class:`megatron_kd.teachers.cache.codec.Codec`.
        keys: field of the class -> the configuration key that it comes from.
    """

    path: str
    keys: Mapping[str, str]

    def load(self) -> type[Any]:
        """Import the class."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)


CODECS: Mapping[str, CodecRow] = {
    "top_k": CodecRow("megatron_kd.teachers.cache.codecs.TopKCodec", {"max_ids": "top_k"}),
    "top_p": CodecRow("megatron_kd.teachers.cache.codecs.TopPCodec", {"max_ids": "top_k", "top_p": "top_p"}),
    "sampled": CodecRow(
        "megatron_kd.teachers.cache.codecs.SampledCodec",
        {"max_ids": "num_draws", "proposal_exponent": "proposal_exponent", "seed": "seed"},
    ),
}

HIDDEN = "hidden"
PAYLOADS = (HIDDEN, "top_k", "sampled")
"""What a remote teacher sends: hidden states, or the ids that the codec of this name keeps (``CODECS``)."""


@dataclass(frozen=True)
class TeacherConfig:
    """The ``teacher.*`` keys."""

    placement: str = NO_TEACHER
    """One of ``PLACEMENTS``."""
    path: str | None = None
    cache_path: str | None = None
    """What ``cache_teacher_logits`` wrote for ``data.path``, or for a dataset that it was selected from."""
    eval_cache_path: str | None = None
    """A cache of ``data.eval_path``: with it a cached teacher evaluates the distillation loss too."""
    evaluate: bool = True
    """Evaluate the distillation loss on ``data.eval_path`` too."""
    tensor_model_parallel_size: int | None = None
    """None means the student's; 1 for a remote teacher."""
    pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool | None = None
    """None means the student's, where the teacher is tensor parallel."""
    stash_megabytes: int = 1024
    """Co-located: hidden states kept on a device at a time; more of them go to host memory."""
    num_ranks: int | None = None
    """Remote: how many of the world's ranks, the last ones, are the teacher's."""
    prefetch_depth: int = 2
    """Remote: finished micro-batches that a data-parallel rank of the teacher may hold until the student takes them."""
    payload: str = HIDDEN
    """Remote: what is sent, one of ``PAYLOADS``. For a few ids the teacher's ranks compute its output layer."""
    top_k: int = 64
    """Ids per token of the payload ``top_k``."""
    num_draws: int = 50
    """Draws per token of the payload ``sampled``."""

    @property
    def where(self) -> Placement:
        """The placement's row of the table; that of no teacher for an unknown name, which :meth:`validate` refuses."""
        return PLACEMENTS.get(self.placement, PLACEMENTS[NO_TEACHER])

    @property
    def source(self) -> str | None:
        """Path of the checkpoint or cache that the teacher is read from."""
        return getattr(self, self.where.source)

    @property
    def own_ranks(self) -> int:
        """Number of ranks that are the teacher's alone."""
        return (self.num_ranks or 0) if self.where.ranks_module else 0

    @property
    def payload_ids(self) -> int | None:
        """Ids per token that a remote teacher sends; None where it sends hidden states."""
        row = CODECS.get(self.payload)
        return None if row is None else getattr(self, row.keys["max_ids"])

    @property
    def gives_sparse_knowledge(self) -> bool:
        """Whether the student gets a few ids per token and the probability outside of them."""
        return self.where.is_sparse or self.payload != HIDDEN

    @property
    def runs_a_model(self) -> bool:
        """Whether the teacher's forward passes are part of the run."""
        return self.where.runs_model

    def validate(self) -> Iterator[str]:
        """Yield one message per invalid value."""
        yield from self.placement_faults()
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "stash_megabytes", "num_ranks",
                     "prefetch_depth", "top_k", "num_draws"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"'teacher.{name}' must be at least 1, not {value}"
        if self.payload not in PAYLOADS:
            yield f"'teacher.payload' must be one of {', '.join(PAYLOADS)}, not {self.payload!r}"
        elif self.payload != HIDDEN and not self.where.takes_payload:
            yield f"'teacher.payload' {self.payload} is for a remote teacher, not a {self.placement} one"

    def placement_faults(self, but: Container[str] = ()) -> Iterator[str]:
        """Yield a message for an unknown placement and for each missing key that it needs, except the keys ``but``."""
        if self.placement not in PLACEMENTS:
            yield f"'teacher.placement' must be one of {', '.join(PLACEMENTS)}, not {self.placement!r}"
        for key, what in self.where.required.items():
            if getattr(self, key) is None and key not in but:
                yield f"'teacher.placement' is {self.placement}, so 'teacher.{key}' ({what}) is required"


@dataclass(frozen=True)
class CachedDataConfig:
    """The ``data.*`` keys of caching."""

    path: str


@dataclass(frozen=True)
class CachedModelConfig:
    """The ``teacher.*`` keys of caching."""

    path: str
    """A checkpoint, a run folder or a Hugging Face folder."""
    layer_spec: LayerSpecName = "auto"
    precision: Precision | None = None
    """None means as trained."""


@dataclass(frozen=True)
class CacheTeacherLogitsConfig:
    """Everything that ``cache_teacher_logits`` reads."""

    RENAMED: ClassVar[Mapping[str, str]] = {"max_ids": "top_k", "draws": "num_draws"}
    data: CachedDataConfig
    teacher: CachedModelConfig
    output: str
    codec: str = "sampled"
    """One of ``CODECS``."""
    top_k: int = 64
    """``top_k``: ids per token; ``top_p``: the most ids that a token has."""
    top_p: float = 0.95
    """``top_p``: the probability that the ids of a token hold."""
    num_draws: int = 50
    """``sampled``: draws per token."""
    proposal_exponent: float = 1.0
    """``sampled``: ids are drawn from teacher ** this; other than 1 gives weighted draws."""
    seed: int = 0
    """``sampled``: seed of the draws."""
    temperature: float = 1.0
    """Temperature of the teacher's distribution; ``distillation.temperature`` of the runs that read the cache."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 8
    chunks_per_shard: int | None = None
    """None for at most 8,192, fewer for small datasets."""
    commit_seconds: float = 20.0
    """The least time between two commits, from which a killed run resumes."""

    def validate(self) -> Iterator[str]:
        """Yield one message per invalid value."""
        if self.codec not in CODECS:
            yield f"'codec' must be one of {', '.join(CODECS)}, not {self.codec!r}"
        for name, largest in (("top_k", MOST_IDS), ("num_draws", MOST_IDS), ("micro_batch_size", 1 << 20)):
            if not 1 <= getattr(self, name) <= largest:
                yield f"'{name}' must be between 1 and {largest}, not {getattr(self, name)}"
        if self.chunks_per_shard is not None and self.chunks_per_shard < 1:
            yield f"'chunks_per_shard' must be at least 1, not {self.chunks_per_shard}"
        if not 0 < self.top_p <= 1:
            yield f"'top_p' must be above 0 and at most 1, not {self.top_p}"
        for name in ("temperature", "proposal_exponent"):
            if not getattr(self, name) > 0:
                yield f"'{name}' must be above 0, not {getattr(self, name)}"
        drawing = [name for name, row in CODECS.items() if "proposal_exponent" in row.keys.values()]
        if self.proposal_exponent != 1.0 and self.codec not in drawing:
            yield f"'proposal_exponent' is for 'codec' {' or '.join(drawing)}, not {self.codec}"
        yield from self.parallel.context_parallel_faults("chunks are cached whole")
