"""What people make of the model's answers: kept, and turned into data to train on."""

from instil.serving.feedback.database import NotRecordedError, StoreError
from instil.serving.feedback.store import Store
from instil.serving.feedback.values import Deleted, Given, Interaction, Judgement

__all__ = ["Deleted", "Given", "Interaction", "Judgement", "NotRecordedError", "Store", "StoreError"]
