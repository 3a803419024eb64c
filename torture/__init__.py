"""The machine that looks for the next fault: kills, power cuts, and inputs that nobody means well.

    make torture              about ten minutes
    make torture HOURS=8      the same with other seeds, again and again

Every case ends in one of five ways. ``clear``: one message that says what is wrong. ``accepted``:
it works, and what it gives is right. ``traceback``, ``hang``, ``silent`` (something is lost or
wrong, and nobody is told) are faults: the case is written down under ``runs/torture/faults`` and
the command fails.
"""
