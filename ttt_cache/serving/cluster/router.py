"""Which replica a new conversation goes to: the one that has fewest.

Serve's own router looks at two replicas drawn by chance; both may be full while a third is not.
"""

from __future__ import annotations

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class FewestFirst(FIFOMixin, RequestRouter):
    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        for each in candidate_replicas:  # ask each: what is remembered knows of no one who left
            self.replica_queue_len_cache.invalidate_key(each.replica_id)
        return [candidate_replicas]
