"""An integer network as firmware: C99 without an interpreter, memory planned ahead, code specialised to the shapes.

lowering (network -> tasks) -> arena (bands of tasks, addresses) -> source (C text), with cost and limits beside it.
"""
