"""The peers of the benchmarks, each a module that runs in a process of its own and prints one line of JSON.

Those that are no dependencies of this project are installed beside it, not into it:

    pip install --no-deps --target PEERS -r benchmarks/peers/requirements.txt
"""
