"""`ttt-cache bench serve`: how many conversations a server holds in real time.

One file each: `plan.py` (what is asked for), `probe.py` (whether a server of Moshi's protocol is
there, and its delay), `sound.py` (what clients say), `client.py` (one conversation), `match.py`
(which answer belongs to which frame), `share.py` (the clients of one process), `level.py` (all
clients of one level), `figures.py` (what a level showed), `ramp.py` (which level is next),
`server.py` (what the server says of itself), `table.py`, `picture.py`, and `run.py`, which puts
them together.
"""
