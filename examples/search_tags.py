"""A chat format of one's own, for environments whose one tool is `search`: calls as Search-R1
writes them (arXiv 2503.09516, section 3.2), in the turns of ChatML.

    agent-r1 check hopworld --renderer examples/search_tags.py:SearchTags
"""

import re

from agent_r1 import Message, ToolCall
from agent_r1.render.chatml import ChatML
from agent_r1.render.encoding import Markup

TOLD = "Search by <search>a few words</search>; what is found follows."


class SearchTags(ChatML):
    """``<search>mentor of Bana Dont</search>`` is a call of ``search``; all else is an answer."""

    class Settings(ChatML.Settings):
        name: str = "search-tags"

    def prompt(self, messages, tools):
        """Tells the format in place of the tools' schemas."""
        told = [m.content for m in messages if m.role == "system"] + [TOLD]
        rest = [m for m in messages if m.role != "system"]
        return super().prompt([Message("system", "\n\n".join(told)), *rest], ())

    def read(self, text):
        """Sampled text as a message."""
        found = re.search(r"<search>(.*?)</search>", text, re.DOTALL)
        if found is None:
            return Message("assistant", text.strip())
        call = ToolCall("search", {"query": found[1].strip()})
        return Message("assistant", text[: found.start()].strip(), (call,))

    def said(self, message):
        """A message as it would have been sampled: the format's own tags are ``Markup``, what
        somebody else wrote is plain text, in which nothing can become a control token.
        """
        pieces = [message.content]
        for call in message.tool_calls:
            pieces += [Markup("<search>"), call.arguments["query"], Markup("</search>")]
        return pieces
