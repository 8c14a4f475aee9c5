"""Any interleaving of steps, masks, resets and restored states, against one oracle per row."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from strategies import ANY, SYSTEMS, cases, masks
from support import Saved, Session

BATCH = 3


class Conversations(RuleBasedStateMachine):
    """Three rows of one batch; `Session` compares what every call executed."""

    @initialize(case=st.sampled_from((ANY, *SYSTEMS)).flatmap(cases))
    def start(self, case):
        self.case = case
        self.session = Session(case, case.build_stirred(), BATCH)
        self.mask = None
        self.saved: Saved | None = None

    @rule()
    def step(self):
        self.session.stream(self.case.tokens(BATCH, 1), self.mask)

    @rule(length=st.integers(2, 20))
    def steps(self, length):
        self.session.stream(self.case.tokens(BATCH, length), self.mask)

    @rule(mask=st.none() | masks(BATCH))
    def set_exec_mask(self, mask):
        self.mask = mask

    @rule(mask=masks(BATCH))
    def reset(self, mask):
        self.session.reset(mask)

    @rule()
    def save(self):
        self.saved = self.session.save()

    @precondition(lambda self: self.saved is not None)
    @rule()
    def restore(self):
        self.session.restore(self.saved)


Conversations.TestCase.settings = settings(stateful_step_count=30)
TestConversations = Conversations.TestCase
