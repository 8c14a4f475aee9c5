"""One replica per GPU under Ray Serve, with conversations that outlive their replica.

One file each: `asgi.py` (what the network sees), `replica.py` (a model that is served),
`registry.py` and `others.py` (which replica has which conversation), `router.py` (where a new one
goes), `export.py` (metrics), `app.py` (all of that as a Serve application), `run.py` (the command).
`docs/cluster.md` is the page for users.
"""
