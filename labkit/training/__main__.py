"""Print the path of a launch file: ``python -m labkit.training fsdp2``."""

import sys

from labkit.training.launch import launch_config, launch_configs

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m labkit.training {{{','.join(launch_configs())}}}")
    try:
        print(launch_config(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
