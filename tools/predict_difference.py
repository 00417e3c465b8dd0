"""``python tools/predict_difference.py --config FILE [key=value …] [--dry-run]``: see megatron_kd/cli.py."""

from megatron_kd.cli import main

if __name__ == "__main__":
    main("predict_difference")
