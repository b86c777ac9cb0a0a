"""The chaos harness: real processes under load, a seeded schedule of faults, and a checker that judges by the tables.

app        the tasks, each of which journals its runs          producer   a process that takes orders
journal    what processes wrote down outside the stores        tables     orders, effects, the life of every row
processes  one process under its keeper                        stage      servers, processes, and who is who
observer   looks at both stores as an outsider                 faults     what is broken, and what that may cost
schedule   which fault when, from a seed                       checker    the invariants I1 to I8
report     what is said of a run                               __main__   `python3 dev.py chaos`
"""
