"""Many conversations at once: a batched server that speaks Moshi's websocket protocol.

One file each: `load.py` (the model), `engine.py` (rows of one batch), `clock.py` (who steps when),
`codec.py` (sound on its way: `opus.py`, `pcm.py`) and `conversation.py` (one client), `pool.py`
(processes that code Opus: `opus_process.py`, in which `opus_worker.py` runs),
`sessions.py` (conversations on disk), `host.py` (who comes, goes and is saved), `metrics.py`,
`talk.py` (Moshi's protocol over any connection), `token.py`, `web.py` (what the network sees),
`page.py` (the page for browsers, whose files are in `page/`), `run.py` (from the port to the signal
that ends it). `docs/serving.md` is the page for users.
"""
