"""``python tools/plot.py RUN… [output=FILE.png] [x=steps|tokens|flops]``: see megatron_kd/cli.py."""

from megatron_kd.cli import main

if __name__ == "__main__":
    main("plot")
