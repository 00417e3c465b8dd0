"""``python tools/cache_teacher_logits.py --config FILE [key=value …] [--dry-run]``: see megatron_kd/cli.py."""

from megatron_kd.cli import main

if __name__ == "__main__":
    main("cache_teacher_logits")
