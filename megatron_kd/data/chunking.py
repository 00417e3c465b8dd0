"""Cut documents' ids into chunks of at most L = ``seq_length + 1`` ids.

``packed``: documents are concatenated and cut every L ids; windows do not overlap.

``sentence_end``: MiniPLM's rule (arXiv 2410.17215, its released ``tokenize_pile``). Take L ids from the front of the
buffer, search backwards for a sentence end, keep the ids up to and including it and push the rest back; without one,
keep all L. There is a sentence end at i if the id is eos; or if it is in ``end_sent`` and its text has a line break; or
if it is in ``end_sent`` and the text of ids i and i + 1 together has a space. ``end_sent``: ids whose text has one of
``. ! ? ; \\n`` and no opening bracket without its closing one. With ``prepend_bos`` a chunk starts with bos, within L.

``prompt_response``: one chunk per document, its prompt, response and eos; what exceeds L is cut off.

The first two keep one buffer per domain, so a chunk never mixes domains, and yield chunks in the order in which the
documents that complete them arrive: the result does not depend on how the documents are cut into blocks.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_kd.data.tokenization import LoadedTokenizer

SENTENCE_END_CHARACTERS = ".!?;\n"
# MiniPLM's third pair is literally a backslash and an opening brace; kept, so that chunks equal the released ones.
BRACKET_PAIRS = (("[", "]"), ("(", ")"), ("\\", "{"), ("<", ">"))
MAX_CHUNKS_PER_DOCUMENT = 2000
_LOOK_BACK = 64
_CLEAN_UPS = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")


@dataclass(frozen=True)
class Chunks:
    """Finished chunks.

    Attributes:
        ids: the chunks' ids one after another, ``[sum(lengths)]``.
        lengths: int64 ``[n]``.
        domains: uint16 ``[n]``, numbers in the chunker's ``domain_names``; None from a chunker of one domain.
        prompt_lengths: int32 ``[n]``, ids of each chunk's prompt; None without prompts.
    """

    ids: np.ndarray
    lengths: np.ndarray
    domains: np.ndarray | None = None
    prompt_lengths: np.ndarray | None = None

    def select(self, members: np.ndarray) -> "Chunks":
        """Return the chunks where ``members``, bool ``[n]``, is true."""
        domains = None if self.domains is None else self.domains[members]
        prompts = None if self.prompt_lengths is None else self.prompt_lengths[members]
        return Chunks(self.ids[np.repeat(members, self.lengths)], self.lengths[members], domains, prompts)


class SentenceEnds:
    """Finds sentence ends in a stream of ids.

    Args:
        token_texts: decoded text of every id, ``[vocab_size]``.
        eos_id: always ends a sentence.
        pair_has_space: (id, next id) → whether their text together has a space; None if it has one exactly where one of
            the two texts has (byte-level vocabularies).
    """

    def __init__(
        self, token_texts: Sequence[str], eos_id: int, pair_has_space: Callable[[int, int], bool] | None = None
    ) -> None:
        end_sent = np.array([_is_end_sent(text) for text in token_texts], dtype=bool)
        end_sent[eos_id] = True
        self.count = int(end_sent.sum())
        self._end_sent = end_sent
        self._certain = end_sent & np.array(["\n" in text for text in token_texts], dtype=bool)
        self._certain[eos_id] = True
        self._has_space = np.array([" " in text for text in token_texts], dtype=bool)
        self._pair_has_space = lru_cache(maxsize=1 << 20)(pair_has_space) if pair_has_space else None

    @classmethod
    def of(cls, tokenizer: LoadedTokenizer) -> "SentenceEnds":
        """Build the finder for a tokenizer, decoding its whole vocabulary once."""
        texts = tokenizer.token_texts
        if tokenizer.is_byte_level and not tokenizer.cleans_up_spaces:
            return cls(texts, tokenizer.info.eos_id)

        def pair_has_space(first: int, second: int) -> bool:
            text = tokenizer.backend.decode([first, second], skip_special_tokens=False)
            if tokenizer.cleans_up_spaces:
                for spaced in _CLEAN_UPS:
                    text = text.replace(spaced, spaced[1:])
                text = text.replace(" ' ", "'")
            return " " in text

        return cls(texts, tokenizer.info.eos_id, pair_has_space)

    def last_in(self, stream: np.ndarray, start: int, stop: int) -> int:
        """Return the index of the last sentence end in ``stream[start:stop]``, or -1; searches backwards."""
        while start < stop:
            first = max(start, stop - _LOOK_BACK)
            found = self._last_near(stream, first, stop)
            if found >= 0:
                return found
            stop = first
        return -1

    def _last_near(self, stream: np.ndarray, start: int, stop: int) -> int:
        ids = stream[start:stop]
        may_end = self._end_sent[ids].nonzero()[0]
        for place in may_end[::-1].tolist():
            if self._certain[ids[place]] or start + place + 1 == len(stream):  # the buffer's last id has no next one
                return start + place
            if self._has_space_between(int(ids[place]), int(stream[start + place + 1])):
                return start + place
        return -1

    def _has_space_between(self, one: int, following: int) -> bool:
        if self._pair_has_space is None:
            return bool(self._has_space[one] or self._has_space[following])
        return self._pair_has_space(one, following)


class DomainChunker:
    """Chunks the documents of one domain, with a buffer.

    Args:
        length: L, ids per chunk at most.
        sentence_ends: None for ``packed``.
        bos_id: put at the start of every chunk and counted in L; None for none.
    """

    def __init__(self, length: int, sentence_ends: SentenceEnds | None = None, bos_id: int | None = None) -> None:
        self._sentence_ends = sentence_ends
        self._bos_id = bos_id
        self._prefix = 0 if bos_id is None else 1
        self._window = length - self._prefix
        self._buffer = np.zeros(0, dtype=np.uint32)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[Chunks, np.ndarray]:
        """Append documents that end in eos.

        Args:
            ids: ``[sum(lengths)]``.
            lengths: ids per document, ``[n]``.

        Returns:
            the chunks that they complete, and for each chunk the index in ``[0, n)`` of the document that completed it.
        """
        stream = np.concatenate([self._buffer.astype(ids.dtype), ids]) if len(self._buffer) else ids
        document_ends = len(self._buffer) + np.cumsum(lengths)
        if self._sentence_ends is None:
            starts, stops, rest = self._cut_packed(len(stream))
        else:
            starts, stops, rest = self._cut_at_sentence_ends(stream, document_ends)
        self._buffer = stream[rest:].copy()
        completed_by = np.searchsorted(document_ends, starts + self._window)
        return self._assemble(stream, starts, stops), completed_by

    def flush(self) -> Chunks:
        """Return what is left as one chunk; a single id, which would predict nothing, stays in the buffer."""
        stream = self._buffer
        ends = np.array([len(stream)] if len(stream) + self._prefix > 1 and len(stream) else [], dtype=np.int64)
        if len(ends):
            self._buffer = stream[:0]
        return self._assemble(stream, np.zeros(len(ends), dtype=np.int64), ends)

    @property
    def num_buffered(self) -> int:
        """Ids in no chunk yet."""
        return len(self._buffer)

    def _cut_packed(self, size: int) -> tuple[np.ndarray, np.ndarray, int]:
        count = size // self._window
        starts = np.arange(count, dtype=np.int64) * self._window
        return starts, starts + self._window, count * self._window

    def _cut_at_sentence_ends(
        self, stream: np.ndarray, document_ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int]:
        kept_starts, kept_stops = [], []
        position = 0
        while True:
            starts, stops = self._walk(position, stream)
            kept = stops - starts + self._prefix > 1  # a chunk of one id is dropped
            documents = np.searchsorted(document_ends, starts + self._window)
            overlong = _first_overlong(documents, kept)
            if overlong is None:
                kept_starts.append(starts[kept])
                kept_stops.append(stops[kept])
                rest = int(stops[-1]) if len(stops) else position
                return np.concatenate(kept_starts), np.concatenate(kept_stops), rest
            first_dropped = overlong
            before = np.arange(len(starts)) < first_dropped
            kept_starts.append(starts[kept & before])
            kept_stops.append(stops[kept & before])
            position = int(document_ends[documents[first_dropped]])  # the rest of the document is dropped

    def _walk(self, position: int, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self._sentence_ends is not None
        starts, stops = [], []
        while position + self._window <= len(stream):
            end = self._sentence_ends.last_in(stream, position, position + self._window)
            stop = end + 1 if end >= 0 else position + self._window
            starts.append(position)
            stops.append(stop)
            position = stop
        return np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)

    def _assemble(self, stream: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Chunks:
        if not len(starts):
            return Chunks(stream[:0], np.zeros(0, dtype=np.int64))
        if not self._prefix and (starts[1:] == stops[:-1]).all():
            return Chunks(stream[starts[0] : stops[-1]], stops - starts)
        prefix = np.full(self._prefix, self._bos_id or 0, dtype=stream.dtype)
        parts = [part for start, stop in zip(starts, stops, strict=True) for part in (prefix, stream[start:stop])]
        return Chunks(np.concatenate(parts), stops - starts + self._prefix)


class Chunker:
    """Chunks documents of several domains, with a buffer for each.

    Args:
        length: L, ids per chunk at most.
        sentence_ends: None for ``packed``.
        bos_id: put at the start of every chunk; None for none.
    """

    def __init__(self, length: int, sentence_ends: SentenceEnds | None = None, bos_id: int | None = None) -> None:
        self._domains: dict[str, DomainChunker] = defaultdict(lambda: DomainChunker(length, sentence_ends, bos_id))
        self.num_dropped = 0
        """Documents that went into no chunk: never any."""

    @property
    def domain_names(self) -> list[str]:
        """Labels of the domains, in order of first appearance."""
        return list(self._domains)

    def add(
        self, ids: np.ndarray, lengths: np.ndarray, domains: Sequence[str], prompt_lengths: object = None
    ) -> Chunks:
        """Append documents that end in eos, and return the chunks that they complete.

        Args:
            ids: ``[sum(lengths)]``.
            lengths: ids per document, ``[n]``.
            domains: label per document, n of them.
            prompt_lengths: ignored; for ``PromptResponseChunker``'s interface.
        """
        if not len(lengths):
            return Chunks(ids, lengths)
        labels = list(dict.fromkeys(domains))
        if len(labels) == 1:
            chunks = self._domains[labels[0]].add(ids, lengths)[0]
            return self._labelled(chunks, np.full(len(chunks.lengths), self.domain_names.index(labels[0])))
        numbers = {label: number for number, label in enumerate(labels)}
        label_of = np.array([numbers[domain] for domain in domains], dtype=np.int64)
        pieces: list[np.ndarray] = []
        keys: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        for number, label in enumerate(labels):
            members = np.flatnonzero(label_of == number)
            is_member = np.repeat(label_of == number, lengths)
            chunks, completed_by = self._domains[label].add(ids[is_member], lengths[members])
            pieces.extend(_split(chunks))
            keys.append(members[completed_by])
            owners.append(np.full(len(chunks.lengths), self.domain_names.index(label)))
        order = np.argsort(np.concatenate(keys), kind="stable") if keys else np.zeros(0, np.int64)
        chunks = _join([pieces[index] for index in order.tolist()], ids.dtype)
        return self._labelled(chunks, np.concatenate(owners)[order] if owners else order)

    def flush(self) -> Chunks:
        """Return the leftovers, domain after domain in order of first appearance."""
        flushed = [domain.flush() for domain in self._domains.values()]
        owners = np.repeat(np.arange(len(flushed)), [len(chunks.lengths) for chunks in flushed])
        return self._labelled(_join([part for chunks in flushed for part in _split(chunks)], np.uint32), owners)

    @staticmethod
    def _labelled(chunks: Chunks, domains: np.ndarray) -> Chunks:
        return Chunks(chunks.ids, chunks.lengths, domains.astype(np.uint16))

    @property
    def num_buffered(self) -> int:
        """Ids in no chunk yet."""
        return sum(domain.num_buffered for domain in self._domains.values())


class PromptResponseChunker:
    """Makes one chunk per document: its prompt, its response and eos, cut after ``length`` ids.

    Args:
        length: L, ids per chunk at most.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._domains: dict[str, int] = {}
        self.num_dropped = 0
        """Documents without an id of a response within the first L ids."""
        self.num_buffered = 0
        """Ids in no chunk yet: never any."""

    @property
    def domain_names(self) -> list[str]:
        """Labels of the domains, in order of first appearance."""
        return list(self._domains)

    def add(self, ids: np.ndarray, lengths: np.ndarray, domains: Sequence[str], prompt_lengths: np.ndarray) -> Chunks:
        """Return a chunk for each of n documents that has room for a response; ``ids`` is ``[sum(lengths)]``."""
        place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        shorter = np.minimum(lengths, self._length)
        kept = (prompt_lengths < shorter) & (shorter > 1)
        self.num_dropped += int((~kept).sum())
        inside = (place < self._length) & np.repeat(kept, lengths)
        owners = np.array([self._domains.setdefault(domain, len(self._domains)) for domain in domains], np.uint16)
        return Chunks(ids[inside], shorter[kept], owners[kept], prompt_lengths[kept].astype(np.int32))

    def flush(self) -> Chunks:
        """Return no chunks: nothing is left over."""
        return Chunks(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.int64))


def _is_end_sent(text: str) -> bool:
    if not any(character in text for character in SENTENCE_END_CHARACTERS):
        return False
    return not any(opening in text and closing not in text for opening, closing in BRACKET_PAIRS)


def _first_overlong(documents: np.ndarray, kept: np.ndarray) -> int | None:
    """Return the index of the first chunk that is the 2,001st kept one of its document, or None."""
    counted = documents[kept]
    if len(counted) <= MAX_CHUNKS_PER_DOCUMENT:
        return None
    excess = np.flatnonzero(counted[MAX_CHUNKS_PER_DOCUMENT:] == counted[:-MAX_CHUNKS_PER_DOCUMENT])
    return int(np.flatnonzero(kept)[excess[0] + MAX_CHUNKS_PER_DOCUMENT]) if len(excess) else None


def _split(chunks: Chunks) -> list[np.ndarray]:
    return np.split(chunks.ids, np.cumsum(chunks.lengths)[:-1]) if len(chunks.lengths) else []


def _join(parts: list[np.ndarray], dtype: np.dtype | type) -> Chunks:
    if not parts:
        return Chunks(np.zeros(0, dtype=dtype), np.zeros(0, dtype=np.int64))
    return Chunks(np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64))
