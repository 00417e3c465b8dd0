"""``python tools/convert_tokenization.py --config FILE [key=value …] [--dry-run]``: see megatron_kd/cli.py."""

from megatron_kd.cli import main

if __name__ == "__main__":
    main("convert_tokenization")
