"""``python tools/fit_scaling_law.py RUN… output=FOLDER``: see megatron_kd/cli.py."""

from megatron_kd.cli import main

if __name__ == "__main__":
    main("fit_scaling_law")
