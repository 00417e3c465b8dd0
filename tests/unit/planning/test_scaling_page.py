"""docs/scaling.md is what plan_run says."""

from pathlib import Path

from megatron_kd.planning.scaling_page import page


def test_the_page_is_up_to_date():
    written = (Path(__file__).resolve().parents[3] / "docs/scaling.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m megatron_kd.planning.scaling_page > docs/scaling.md"
