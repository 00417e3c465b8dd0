"""The quickstart's tokenizer step as a process."""

import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer


def test_trains_a_byte_level_bpe_that_round_trips(tmp_path: Path) -> None:
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (json, subprocess)]
    texts = [part for source in sources for part in source.split("\n\n")]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    program = [sys.executable, "-m", "megatron_kd.quickstart.tokenizer"]
    subprocess.run([*program, str(corpus), "500", str(tmp_path / "tokenizer")], check=True, timeout=120)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 500
    text = "return é 漢 self.args"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("        return self.args").ids) < 12
