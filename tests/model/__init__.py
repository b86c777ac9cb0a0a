"""The protocol as a program that can be searched: what jobq promises, tried in every order of its steps.

Read in this order:

- `scripts`: what each Lua script does, as a plain function over a dict of lists. `tests/faults/test_scripts_model.py`
  calls it side by side with the real scripts, so what is proved here is proved of what Redis runs.
- `state`: everything that is true at one moment, in both stores and in every process.
- `relay`, `worker`, `sweeper`, `faults`: every atomic step that may come next, each naming the code it stands for.
- `properties`: what must hold in every state and at every step.
- `explore`: all states, breadth first; the shortest way to one that should not be; and from each, whether the jobs
  still get done.
- `worlds`: the bounds that are searched. `wake_up`: the relay's sleep, a small model of its own.

A rule of the protocol can be broken by its name (`World.broken`). `test_protocol.py` breaks each, and expects the
search to find what it breaks: a model that finds nothing when a rule is gone would prove nothing while it is there.
"""
