"""What is no conversation is told by its place, with what would be one."""

import pytest

from megatrain.chat.conversation import ChatError, ChatMessage, conversation_of, require_turns

USER = {"role": "user", "content": "Hello"}


def test_a_conversation_of_json():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    found = conversation_of([{"role": "system", "content": ""}, {"role": "user", "content": parts, "name": None}])
    assert found == (ChatMessage("system", ""), ChatMessage("user", "one\ntwo"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], 'messages is empty. Give at least one: [{"role": "user", "content": "Hello"}].'),
        ("Hello", 'messages is a text. Give a list: [{"role": "user", "content": "Hello"}].'),
        (None, 'messages is null. Give a list: [{"role": "user", "content": "Hello"}].'),
        (["Hello"], 'messages[0] is a text. Give an object: {"role": "user", "content": "Hello"}.'),
        (
            [USER, {"role": "bot", "content": "a"}],
            "messages[1] has the role 'bot'. Roles are system, developer, user, assistant, tool, observation.",
        ),
        ([{"content": "a"}], "messages[0] has no role. Roles are system, developer, user, assistant, tool, observation."),
        ([{"role": "user"}], 'messages[0] has no content. Give a text: "content": "Hello".'),
        ([{"role": "user", "content": 3}], 'messages[0] has a content that is a number. Give a text: "content": "Hello".'),
        (
            [{**USER, "tool_calls": []}],
            "messages[0] has 'tool_calls', which is not supported: a message has a role and a content. Leave it out.",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            'messages[0].content[0] is \'image_url\', and only texts are understood: {"type": "text", "text": "Hello"}.',
        ),
        (
            [{"role": "user", "content": "a\ud83d"}],
            "messages[0].content is no text of Unicode: '\\ud83d' is half of a character.",
        ),
    ],
)
def test_errors(values, said):
    with pytest.raises(ChatError) as error:
        conversation_of(values)
    assert str(error.value) == said


def test_turns():
    user, answer = ChatMessage("user", "a"), ChatMessage("assistant", "b")
    require_turns([user], continued=False)
    require_turns([user, answer], continued=True)
    with pytest.raises(
        ChatError, match=r"the last message is the assistant's, so there is nothing to answer\. .*continue_final_message"
    ):
        require_turns([user, answer], continued=False)
    with pytest.raises(ChatError, match="continue_final_message goes on with an answer, and the last message is of role user"):
        require_turns([user], continued=True)
    with pytest.raises(ChatError, match="messages is empty"):
        require_turns([], continued=False)
