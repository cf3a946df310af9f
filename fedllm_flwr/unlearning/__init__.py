"""Removing a client, exactly where the method can, and proving it.

`signs` and `exact_merge` make a one-shot merge from which a client can be taken out to the byte; `ledger` keeps what
training in rounds needs for `removal`, the table of methods and their maths. `attacks`, `extraction` and `distances`
measure what a model still knows, `budget` counts the queries for it, and `verdict` decides against retrained models.
`certificate` and `deletion_log` are what is left in writing. Nothing is imported here: each module brings its own
libraries, and few callers need all.
"""
