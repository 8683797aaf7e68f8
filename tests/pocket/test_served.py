"""Training and serving agree: the ids that the chat sends are the ids that training saw, for every bundled record."""

from dataclasses import replace

import instil
from instil.inference.session import Chat
from instil.pocket import data_folder, model_folder
from instil.pocket.instructions import SETS
from instil.pocket.trial import base_under


def test_the_chat_sends_what_training_saw():
    loaded = base_under(model_folder(), "chatml")
    chat = Chat(loaded)
    files = [data_folder() / f"{name}.jsonl" for name in SETS]
    sent = 0
    for row in instil.exchanges(instil.read(files), loaded.tokenizer, template="chatml"):
        assert not row.problems
        (conversation,) = row.record.conversations
        turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        assert len(turns) == len(row.exchanges)
        for turn, exchange in zip(turns, row.exchanges, strict=True):
            served = chat.prompt(replace(conversation, messages=conversation.messages[:turn]))
            assert served.dropped_turns == 0
            assert list(served.ids) == exchange.prompt_ids.tolist(), row.record.source
            # and the answer ends where the chat stops, not before
            completion = exchange.completion_ids.tolist()
            assert completion[-1] in chat.engine.stop_ids
            assert not chat.engine.stop_ids & set(completion[:-1])
            sent += 1
    assert sent > 5500
