"""The list of operations over HTTP: what the APIs serve, and what `/openapi.json` describes."""

from __future__ import annotations

from typing import Final

from anynode.server.api.ai_sdk.bodies import ChatMessages, ChatMessagesQuery, Stopped, Ticket
from anynode.server.api.ai_sdk.handlers import AiSdk
from anynode.server.api.ai_sdk.wire import REQUEST_BYTES_MAX, ChatRequest, decode_request
from anynode.server.api.openai.bodies import CreateResponse, Model, Models, ResponseObject, ResponseQuery
from anynode.server.api.openai.bodies import decode_request as decode_response_request
from anynode.server.api.openai.handlers import Responses
from anynode.server.api.rest import Rest
from anynode.server.errors import (
    AgentFailed,
    ConversationBusy,
    Draining,
    Forbidden,
    InvalidFrame,
    MessageIdTaken,
    NotFound,
    RateLimited,
    RoleOrder,
)
from anynode.server.protocol.bodies import (
    Answer,
    AnyPostedMessage,
    Appended,
    Cancel,
    CancelledTurn,
    Chat,
    ChatAnswer,
    Continue,
    Conversation,
    ConversationChanges,
    Conversations,
    ConversationsQuery,
    EventsQuery,
    Export,
    Messages,
    MessagesQuery,
    NewConversation,
    NewMessages,
    Regenerate,
    StartedTurn,
    StoredTurn,
)
from anynode.server.protocol.frames import Message
from anynode.server.transport.http import Operation

APPENDED_BYTES_MAX: Final = 4_194_304  # of a body that appends messages: a whole history moves in at once

AI_SDK_PATH: Final = "/api/chat"
_CHAT: Final = AI_SDK_PATH + "/{chat_id}"
_ONE: Final = "/conversations/{conversation_id}"
_TURN_ERRORS: Final = (NotFound, ConversationBusy, RoleOrder, RateLimited, Draining, AgentFailed)
_QUESTION_ERRORS: Final = (*_TURN_ERRORS, MessageIdTaken)

REST: Final[tuple[Operation, ...]] = (
    Operation(
        method="POST",
        path="/conversations",
        name="createConversation",
        summary="Make a conversation; or get it, where the client has made it under this `client_id` before.",
        handler=Rest.create,
        bodies=(NewConversation,),
        replies={200: Conversation, 201: Conversation},
    ),
    Operation(
        method="GET",
        path="/conversations",
        name="listConversations",
        summary="The user's conversations, newest activity first; or those with a text in their titles.",
        handler=Rest.list,
        query=ConversationsQuery,
        replies={200: Conversations},
    ),
    Operation(
        method="GET",
        path=_ONE,
        name="readConversation",
        summary="One conversation.",
        handler=Rest.read,
        replies={200: Conversation},
        errors=(NotFound,),
    ),
    Operation(
        method="PATCH",
        path=_ONE,
        name="updateConversation",
        summary="Change title, system prompt or metadata. The next turn sees it; the place in the list stays.",
        handler=Rest.update,
        bodies=(ConversationChanges,),
        replies={200: Conversation},
        errors=(NotFound,),
    ),
    Operation(
        method="DELETE",
        path=_ONE,
        name="deleteConversation",
        summary="Delete it with its messages, turns and events. A running turn is cancelled.",
        handler=Rest.delete,
        replies={204: None},
        errors=(NotFound,),
    ),
    Operation(
        method="GET",
        path=_ONE + "/messages",
        name="readMessages",
        summary="The newest messages, oldest first; with format=openai as the chat completions API has them.",
        handler=Rest.messages,
        query=MessagesQuery,
        replies={200: Messages | Export},
        errors=(NotFound,),
    ),
    Operation(
        method="POST",
        path=_ONE + "/messages",
        name="appendMessages",
        summary="Append one message or several, all or none, in the right order of roles. No agent is asked.",
        handler=Rest.append,
        bodies=(NewMessages, AnyPostedMessage),
        body_bytes_max=APPENDED_BYTES_MAX,
        replies={201: Message | Appended},
        errors=(NotFound, ConversationBusy, RoleOrder),
    ),
    Operation(
        method="POST",
        path=_ONE + "/continue",
        name="continueConversation",
        summary="Ask, and wait for the end of the turn. A client that goes away does not cancel it.",
        handler=Rest.proceed,
        bodies=(Continue,),
        replies={200: Answer, 202: StartedTurn},
        errors=_QUESTION_ERRORS,
    ),
    Operation(
        method="POST",
        path=_ONE + "/regenerate",
        name="regenerateAnswer",
        summary="Answer the last question again, and wait for it; the old answer stays readable as superseded.",
        handler=Rest.regenerate,
        bodies=(Regenerate,),
        replies={200: Answer, 202: StartedTurn},
        errors=_TURN_ERRORS,
    ),
    Operation(
        method="POST",
        path=_ONE + "/cancel",
        name="cancelTurn",
        summary="Ask for the running turn to be stopped, wherever it runs; what was said is kept.",
        handler=Rest.cancel,
        bodies=(Cancel,),
        replies={200: CancelledTurn},
        errors=(NotFound,),
    ),
    Operation(
        method="GET",
        path=_ONE + "/turns/{turn_id}",
        name="readTurn",
        summary="A turn: its status, usage and error, and the messages that answered in it.",
        handler=Rest.turn,
        replies={200: StoredTurn},
        errors=(NotFound,),
    ),
    Operation(
        method="GET",
        path=_ONE + "/events",
        name="followConversation",
        summary="The journal as Server-Sent Events: the frames of the socket, `id` is the seq, from a cursor on.",
        handler=Rest.events,
        query=EventsQuery,
        replies={200: "text/event-stream"},
        errors=(NotFound, RateLimited),
    ),
    Operation(
        method="POST",
        path="/api/{user_id}/chat",
        name="chat",
        summary="One whole exchange: ask in a conversation, or in a new one, and get the answer.",
        handler=Rest.chat,
        bodies=(Chat,),
        replies={200: ChatAnswer},
        errors=(Forbidden, *_QUESTION_ERRORS),
    ),
)

AI_SDK: Final[tuple[Operation, ...]] = (
    Operation(
        method="POST",
        path=AI_SDK_PATH,
        name="sendChatMessage",
        summary="Ask in a chat, as the AI SDK's DefaultChatTransport does; the answer is a UI message stream.",
        handler=AiSdk.send,
        bodies=(ChatRequest,),
        body_bytes_max=REQUEST_BYTES_MAX,
        decode=decode_request,
        replies={200: "text/event-stream"},
        errors=_QUESTION_ERRORS,
    ),
    Operation(
        method="GET",
        path=_CHAT + "/stream",
        name="resumeChatStream",
        summary="The turn that runs in a chat, or has answered last, from its beginning; 204 where there is none.",
        handler=AiSdk.resume,
        replies={200: "text/event-stream", 204: None},
        errors=(RateLimited,),
    ),
    Operation(
        method="POST",
        path=_CHAT + "/stop",
        name="stopChat",
        summary="Stop the turn that runs in a chat, wherever it runs, and wait for its end; what was said is kept.",
        handler=AiSdk.stop,
        replies={200: Stopped},
        errors=(NotFound, RateLimited),
    ),
    Operation(
        method="GET",
        path=_CHAT + "/messages",
        name="readChatMessages",
        summary="The messages of a chat as the AI SDK shows them, to begin with.",
        handler=AiSdk.messages,
        query=ChatMessagesQuery,
        replies={200: ChatMessages},
        errors=(NotFound,),
    ),
    Operation(
        method="POST",
        path="/auth/ticket",
        name="issueTicket",
        summary="A ticket that lets one connection to /api/chat in, for clients that can set nothing but the URL.",
        handler=AiSdk.ticket,
        replies={201: Ticket},
        errors=(RateLimited,),
    ),
)

_RESPONSE: Final = "/v1/responses/{response_id}"

RESPONSES: Final[tuple[Operation, ...]] = (
    Operation(
        method="POST",
        path="/v1/responses",
        name="createResponse",
        summary="Ask, as with the OpenAI Responses API; with `stream` the answer is a stream of its events.",
        handler=Responses.create,
        bodies=(CreateResponse,),
        decode=decode_response_request,
        replies={200: ResponseObject},
        can_stream=True,
        errors=_QUESTION_ERRORS,
    ),
    # Before the next one, whose id may have slashes in it.
    Operation(
        method="POST",
        path=_RESPONSE + "/cancel",
        name="cancelResponse",
        summary="Stop a response, wherever it runs, and wait for its end; what was said is kept.",
        handler=Responses.cancel,
        replies={200: ResponseObject},
        errors=(NotFound, RateLimited),
    ),
    Operation(
        method="GET",
        path=_RESPONSE,
        name="retrieveResponse",
        summary="A response as it is now; with `stream` its events, from the start or after a sequence number.",
        handler=Responses.retrieve,
        query=ResponseQuery,
        replies={200: ResponseObject},
        can_stream=True,
        errors=(NotFound, RateLimited),
    ),
    Operation(
        method="GET",
        path="/v1/models",
        name="listModels",
        summary="What answers here, as a model.",
        handler=Responses.models,
        replies={200: Models},
    ),
    Operation(
        method="GET",
        path="/v1/models/{model}",
        name="retrieveModel",
        summary="The same by its id.",
        handler=Responses.model,
        replies={200: Model},
        errors=(NotFound, InvalidFrame),
    ),
)

OPERATIONS: Final[tuple[Operation, ...]] = (*REST, *AI_SDK, *RESPONSES)
