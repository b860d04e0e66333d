"""Faults under load, with proof: that each landed, what every client got, and that nothing leaked.

A *world* (``world.py``) is instances as processes, each in a network namespace of its own. A *kind* of fault
(``faults/``) is done to it in a *run* (``run.py``), which becomes one *line* (``line.py``) of a file. Only one thing
here is not as in production: processes are forked off one that has imported vLLM already (``zygote.py``), so that a
stage is back in a second or two, and its program obeys orders to fail (``stage_program.py``).
"""
