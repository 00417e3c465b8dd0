"""MiniPLM's sentence-end chunking written out as it is stated, one id at a time: the reference for data/chunking.py."""

from collections.abc import Callable, Sequence


class LiteralBuffer:
    """One domain's buffer; ``length`` ids per chunk at most."""

    def __init__(
        self,
        length: int,
        eos_id: int,
        token_texts: Sequence[str],
        decode: Callable[[list[int]], str],
        bos_id: int | None = None,
        chunk_limit: int = 2000,
    ) -> None:
        self.length, self.eos_id, self.bos_id = length, eos_id, bos_id
        self.texts, self.decode, self.chunk_limit = token_texts, decode, chunk_limit
        self.end_sent = {index for index, text in enumerate(token_texts) if self.may_end(text)} | {eos_id}
        self.front = [] if bos_id is None else [bos_id]
        self.buffer = list(self.front)

    @staticmethod
    def may_end(text: str) -> bool:
        if not any(character in text for character in ".!?;\n"):
            return False
        for opening, closing in (("[", "]"), ("(", ")"), ("\\", "{"), ("<", ">")):
            if opening in text and closing not in text:
                return False
        return True

    def ends_sentence(self, taken: list[int], place: int, rest: list[int]) -> bool:
        index = taken[place]
        if index == self.eos_id:
            return True
        if index not in self.end_sent:
            return False
        if "\n" in self.texts[index]:
            return True
        pair = (taken + rest[:1])[place : place + 2]
        return len(pair) == 1 or " " in self.decode(pair)

    def add(self, document: list[int]) -> list[list[int]]:
        """Append a document's ids with its eos; returns the finished chunks."""
        chunks: list[list[int]] = []
        self.buffer += document
        while len(self.buffer) >= self.length:
            taken, rest = self.buffer[: self.length], self.buffer[self.length :]
            for place in range(len(taken) - 1, len(self.front) - 1, -1):
                if self.ends_sentence(taken, place, rest):
                    taken, rest = taken[: place + 1], taken[place + 1 :] + rest
                    break
            self.buffer = self.front + rest
            if len(taken) <= 1:
                continue
            if len(chunks) == self.chunk_limit:
                self.buffer = list(self.front)
                break
            chunks.append(taken)
        return chunks
