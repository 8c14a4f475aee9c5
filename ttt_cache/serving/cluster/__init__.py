"""One replica per GPU under Ray Serve, with conversations that outlive their replica.

Serve places replicas, looks after them and begins new ones; clients connect to the replicas
themselves, which share a port on each machine: through Serve's proxy a frame takes 2.2 ms of two
processes instead of 0.1 of one.

One file each: `replica.py` (a model that is served), `registry.py` and `others.py` (which replica
has which conversation), `neighbours.py` and `passing.py` (which of a machine has room),
`export.py` (metrics), `app.py` (all of that as a Serve application), `run.py` (the command).
`docs/cluster.md` is the page for users.
"""
