"""``action=unlearn``: take a client out of a finished run, into a new run directory, with a certificate.

`request` says no before anything is written; `models` makes the models that need no training; `prepare` lays out a run
directory that `action=resume` can go on with, whatever the method; `remembers` lists what else held something of the
client; `certify` writes what was done; `command` puts them in order.
"""
