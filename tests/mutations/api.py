"""Mutations of the APIs, of the transport below them and of the server around them."""

from __future__ import annotations

from typing import Final

from tests.mutations.mutation import Change, Mutation

CHUNKS: Final = "server/api/ai_sdk/fold.py"
CHUNK_STREAM: Final = "server/api/ai_sdk/stream.py"
AI_SDK_CONNECTION: Final = "server/api/ai_sdk/connection.py"
STOPS: Final = "server/api/ai_sdk/stops.py"
RESPONSE_STREAM: Final = "server/api/openai/stream.py"

MUTATIONS: Final = (
    Mutation(
        "the AI SDK is not told what a takeover takes back",
        [Change(CHUNKS, "if len(standing) == step.said and not step.unanswered:", "if True:")],
        ["unit/api/ai_sdk/test_fold.py", "system/test_ai_sdk_socket.py"],
    ),
    Mutation(
        "a resume over HTTP shows what was taken back",
        [Change(CHUNKS, "                del shown[step_at:]\n", "")],
        ["unit/api/ai_sdk/test_fold.py", "system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "a stream goes on over what it has shown and a takeover takes back",
        [Change(CHUNK_STREAM, "if chunks.takes_back:", "if False:")],
        ["unit/api/ai_sdk/test_stream.py", "system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "a stream that is cut ends as if it were whole",
        [Change("server/transport/sse.py", "if self.must_be_whole and not is_whole:", "if False:")],
        ["unit/transport/test_sse.py", "system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "resuming twice stops the turn",
        [Change(STOPS, "if not is_resumed:", "if True:")],
        ["unit/api/ai_sdk/test_stops.py", "system/test_ai_sdk_socket.py"],
    ),
    Mutation(
        "what begins between the look and the waiting is missed",
        [
            Change(AI_SDK_CONNECTION, "conversation_id, last_seq, is_own=True", "conversation_id, None, is_own=True"),
            Change(
                AI_SDK_CONNECTION, "if not isinstance(update, DatabaseUnavailable):", "if isinstance(update, list):"
            ),
        ],
        ["unit/api/ai_sdk/test_connection.py", "system/test_ai_sdk_waiting.py"],
    ),
    Mutation(
        "a turn goes on whose client stops it and waits for the next one",
        [Change(AI_SDK_CONNECTION, "await self._stop(self._stops.settle(frame.id))  # else", "pass  # else")],
        ["unit/api/ai_sdk/test_connection.py", "system/test_ai_sdk_waiting.py"],
    ),
    Mutation(
        "a resume after a sequence number repeats that chunk",
        [Change(AI_SDK_CONNECTION, "if sequence > after:", "if sequence >= after:")],
        ["unit/api/ai_sdk/test_connection.py", "system/test_ai_sdk_socket.py"],
    ),
    Mutation(
        "a message that was sent can be changed without a word",
        [Change("server/api/ai_sdk/questions.py", "sent is not None and sent.content != question.text", "False")],
        ["unit/api/ai_sdk/test_questions.py", "system/test_ai_sdk_socket.py", "system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "frames of our own wire may be as long as the AI SDK's",
        [
            Change(
                "server/transport/bounded_websocket.py",
                "self._longer_messages.get(path, self.config.ws_max_size)",
                "4_194_304",
            )
        ],
        ["system/test_ai_sdk_socket.py", "system/test_socket.py"],
    ),
    Mutation(
        "a response that goes on repeats the event that it goes on after",
        [Change(RESPONSE_STREAM, "if event.sequence_number > shown_to", "if event.sequence_number >= shown_to")],
        ["unit/api/openai/test_stream.py", "system/test_responses.py"],
    ),
    Mutation(
        "what a tool call is called with depends on who stored it",
        [Change("server/api/openai/fold.py", '_plain(json.loads(text)), order="sorted"', "json.loads(text)")],
        ["unit/api/openai/test_fold.py"],
    ),
    Mutation(
        "an export replaces a file that came meanwhile",
        [
            Change(
                "server/store/export.py",
                "            if is_forced:\n                beside",
                "            if True:\n                beside",
            )
        ],
        ["system/test_export.py"],
    ),
    Mutation(
        "an export reads the oldest conversations of anybody",
        [
            Change(
                "server/store/rows.py",
                "later = self._conversations.filter(user_id=user_id)",
                "later = Conversation.filter()",
            )
        ],
        ["system/test_export.py", "system/test_forget.py"],
    ),
)
