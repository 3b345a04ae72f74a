"""Ranks, collectives and the plans that they run: which rank does which work, and how tensors travel.

Nothing here knows factors, layers or models. Plans (`grid`, `assignment`, `segments`, `exchange`, `layout`) are pure
functions that every rank evaluates to the same result; a `Communicator` moves the bytes; `agreement` makes sure that
no rank acts alone.
"""
