"""Ranks, collectives and the plans that they run: who does what, and how it travels.

Nothing here knows factors, layers or models. Plans (`grid`, `assignment`, `segments`, `exchange`, `layout`) are pure
functions that every rank evaluates to the same result; a `Communicator` moves the bytes; `agreement` makes sure that
no rank acts alone.
"""
