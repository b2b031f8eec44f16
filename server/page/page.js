// One conversation at a time, over one socket that reconnects and resumes by itself.
const at = (id) => document.getElementById(id);
const [log, box] = [at("log"), at("box")];
const [FIRST_WAIT_MS, LONGEST_WAIT_MS, READY_MS] = [200, 5000, 10_000];
const NOTES = { cancelled: "Stopped.", failed: "The answer failed." };

let token = null;
let socket = null; // the only one whose events are heard
let isReady = false; // whether it is authenticated
let attempts = 0;
let retryTimer, watchdog;
let heartbeatMs = READY_MS;
let conversation = null; // its id; null: a new one
let lastSeq = null; // null until its snapshot has come
let running = null; // the id of the running turn
let stopping = null; // the turn that was asked to stop over this socket
let pending = null; // the message that is not acknowledged: its frame, and the socket that it went over
let refused = null; // the frame of a message that may be sent again as the same
let held = null; // the last frame of a conversation that is not shown
let wasAtBottom = true;
let heightThen = 0; // of the log, when it was last seen whether it is at the bottom
const articles = new Map(); // by id of the user's message, or of the turn

// The connection.

function connect() {
  leave();
  say(attempts || lastSeq !== null ? "reconnecting…" : "connecting…");
  try {
    socket = new WebSocket(location.origin.replace("http", "ws") + "/ws", ["anynode.v1", "bearer." + token]);
  } catch {
    return askForToken("This is not a token."); // not even in form
  }
  socket.onmessage = (event) => {
    watch(2 * heartbeatMs);
    hear(JSON.parse(event.data));
  };
  socket.onclose = ({ code, reason }) => {
    if (code === 3000 || code === 3003) return askForToken(reason);
    if (code === 1009 && pending) dropPending("The message is too large."); // it would be so the next time
    reconnect();
  };
  watch(READY_MS);
}

// A frozen node would not answer the closing handshake, so nobody waits for it.
function leave() {
  clearTimeout(retryTimer);
  clearTimeout(watchdog);
  if (socket) socket.onmessage = socket.onclose = null;
  socket?.close();
  socket = stopping = null;
  isReady = false;
  render();
}

function reconnect() {
  leave();
  say("reconnecting…");
  const wait = Math.min(FIRST_WAIT_MS * 2 ** attempts++, LONGEST_WAIT_MS);
  retryTimer = setTimeout(connect, wait * (0.5 + Math.random() / 2));
}

function watch(ms) {
  clearTimeout(watchdog);
  watchdog = setTimeout(reconnect, ms);
}

const send = (frame) => isReady && socket.send(JSON.stringify(frame));

function hear(frame) {
  if (frame.type !== "ready") attempts = 0; // a node that greets and then fails is not hammered
  if (frame.type === "ready") resume(frame);
  else if (frame.type === "goaway") connect();
  else if (frame.type === "error") showError(frame);
  else if (frame.type === "auth.expiring") notice("The token runs out in a minute.");
  else if (frame.type === "conversation.snapshot") stayAtBottom(() => showSnapshot(frame));
  else if (frame.seq) stayAtBottom(() => showEvent(frame));
  render();
}

function resume(ready) {
  isReady = true;
  heartbeatMs = ready.heartbeat_seconds * 1000;
  watch(2 * heartbeatMs);
  say("connected to " + ready.node_id);
  listConversations();
  if (conversation) follow();
  else transmit();
}

function follow() {
  // A repeated message makes the server follow from that turn's start: with all before it shown, nothing is missed.
  if (pending) lastSeq = null;
  const after = lastSeq === null ? {} : { after: lastSeq };
  send({ type: "conversation.follow", conversation_id: conversation, request_id: conversation, ...after });
}

function transmit() {
  if (!pending || !isReady || (conversation && lastSeq === null)) return;
  pending.isRepeated = pending.socket !== null;
  pending.socket = socket;
  send(pending.frame);
}

function dropPending(why) {
  pending = null;
  notice(why);
}

function acknowledge(id) {
  pending = refused = null;
  box.value = "";
  if (conversation === id) return;
  [conversation, lastSeq] = [id, 0];
  history.replaceState(null, "", "#c=" + id);
  listConversations();
}

// What the server says.

function showEvent(frame) {
  const { type, turn_id } = frame;
  if (type === "turn.started" && frame.message_id === pending?.frame.message_id) {
    const first = held?.conversation_id === frame.conversation_id ? held : null;
    acknowledge(frame.conversation_id);
    if (first) showEvent(first);
    lastSeq = frame.seq - 1; // of a repeated message everything from here on comes once more
  }
  if (frame.conversation_id !== conversation) held = frame;
  if (frame.conversation_id !== conversation || lastSeq === null || frame.seq <= lastSeq) return;
  lastSeq = frame.seq;
  if (type === "message.created") showMessage(frame.message);
  else if (type === "turn.started") startTurn(turn_id, "");
  else if (type === "turn.delta") textOf(turn_id).appendData(frame.text);
  else if (type === "turn.restarted") startTurn(turn_id, frame.text);
  else if (type === "turn.tool_call") showToolCall(turn_id, frame.tool_name);
  else if (type !== "turn.tool_result") endTurn(turn_id, frame.message, frame.error);
}

function showSnapshot(frame) {
  // The journal of a repeated message's turn may be gone: then this is all that tells of it.
  const isAnswer = pending?.socket === socket && (conversation || pending.isRepeated);
  if (isAnswer && (!conversation || conversation === frame.conversation_id)) acknowledge(frame.conversation_id);
  if (frame.conversation_id !== conversation) return;
  clear();
  lastSeq = frame.seq;
  frame.messages.forEach(showMessage);
  if (frame.turn) startTurn(frame.turn.turn_id, frame.turn.text);
  transmit();
}

function showError(frame) {
  if (frame.request_id === "cancel") return; // the turn has ended by itself
  if (pending && frame.request_id === pending.frame.message_id) {
    if (frame.code === "draining") return reconnect(); // the next node gets it
    refused = frame.retryable ? pending.frame : null;
    dropPending(frame.message);
  } else if (conversation && frame.request_id === conversation && !frame.retryable) {
    history.replaceState(null, "", "#");
    open(null);
  }
  notice(frame.message);
}

function showMessage(message) {
  const { id, role, content, status, turn_id, tool_calls } = message;
  if (role === "user") textOf(id, role).data = content;
  if (role !== "assistant") return;
  const key = turn_id ?? id;
  textOf(key).data = content;
  for (const call of tool_calls ?? []) showToolCall(key, call.function.name);
  setStatus(key, status);
}

function startTurn(id, text) {
  running = id;
  article(id).replaceChildren();
  textOf(id).data = text;
  setStatus(id, "running");
}

function endTurn(id, message, error) {
  if (running === id) running = null;
  notice("");
  showMessage({ ...message, turn_id: id });
  if (error) article(id).querySelector(".note").textContent = error.message;
  listConversations();
}

function setStatus(id, status) {
  const shown = article(id);
  shown.className = "assistant " + status;
  shown.querySelector(".note")?.remove();
  if (NOTES[status]) shown.append(element("p", "note", NOTES[status]));
}

// Elements. Whatever came over the wire becomes text, never markup.

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.append(document.createTextNode(text));
  return made;
}

function article(id, role = "assistant") {
  if (!articles.has(id)) {
    articles.set(id, log.appendChild(document.createElement("article")));
    articles.get(id).className = role;
  }
  return articles.get(id);
}

// The text that a turn goes on with: what comes after a tool call is apart from what came before.
function textOf(id, role) {
  const shown = article(id, role);
  const last = shown.lastElementChild;
  return (last?.className === "text" ? last : shown.appendChild(element("p", "text", ""))).firstChild;
}

function showToolCall(turn, name) {
  article(turn).append(element("p", "tool", name + " …"));
}

function clear() {
  articles.clear();
  log.replaceChildren();
  running = null;
}

const isAtBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 5;
const goToBottom = () => (log.scrollTop = log.scrollHeight);

function stayAtBottom(change) {
  const wasThere = isAtBottom();
  change();
  if (wasThere) goToBottom();
}

function say(text) {
  if (at("status").textContent !== text) at("status").textContent = text;
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function render() {
  const [stop, ask] = [at("stop"), at("send")];
  [stop.hidden, ask.hidden] = [!running, !!running];
  stop.disabled = !isReady || stopping === running;
  box.readOnly = ask.disabled = !!pending;
  log.ariaBusy = String(!!running); // an answer is read out when it is whole
  log.classList.toggle("new", !conversation);
  for (const link of at("conversations").querySelectorAll("a")) {
    if (link.hash === "#c=" + conversation) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

async function listConversations() {
  try {
    const answer = await fetch("/conversations?limit=100", { headers: { Authorization: "Bearer " + token } });
    if (!answer.ok) return;
    const items = (await answer.json()).conversations.map(({ id, title }) => {
      const [item, link] = [document.createElement("li"), element("a", "", title || "Untitled")];
      link.href = "#c=" + id;
      item.append(link);
      return item;
    });
    at("conversations").replaceChildren(...items);
    render();
  } catch {} // the socket notices as well, and lists again when it is back
}

// What the person does.

function submit() {
  const content = box.value;
  if (!content.trim() || pending) return;
  const isSame = refused?.content === content && refused.conversation_id === conversation;
  const message_id = isSame ? refused.message_id : newId();
  const frame = { type: "message.send", message_id, request_id: message_id, content, conversation_id: conversation };
  pending = { frame, socket: null };
  notice("");
  goToBottom();
  transmit();
  render();
}

// randomUUID exists in secure contexts only, and http on a LAN address is none.
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return crypto.randomUUID?.() ?? Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function stop() {
  if (!running || !isReady || stopping === running) return;
  stopping = running;
  send({ type: "turn.cancel", conversation_id: conversation, turn_id: running, request_id: "cancel" });
  render();
}

function open(id) {
  if (conversation) send({ type: "conversation.unfollow", conversation_id: conversation });
  [conversation, lastSeq, pending, refused, held] = [id, null, null, null, null];
  clear();
  notice("");
  if (id && isReady) follow();
  if (matchMedia("(pointer: fine)").matches) box.focus(); // on a phone the keyboard would cover what was opened
  render();
}

function askForToken(why) {
  if (pending) refused = pending.frame;
  token = pending = null;
  sessionStorage.removeItem("anynode.token");
  leave();
  say("not connected");
  at("why").textContent = why;
  showLogin(true);
  at("token").focus();
}

function logIn(given) {
  token = given;
  sessionStorage.setItem("anynode.token", given);
  showLogin(false);
  attempts = 0;
  connect();
}

function showLogin(isWanted) {
  at("login").hidden = !isWanted;
  log.hidden = at("ask").hidden = at("side").hidden = isWanted;
  if (isWanted) notice("");
}

function route() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const [given, id] = [fragment.get("token"), fragment.get("c") || null];
  if (given) history.replaceState(null, "", id ? "#c=" + id : location.pathname);
  if (id !== conversation) open(id);
  if (given) logIn(given);
}

box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
addEventListener("keydown", (event) => event.key === "Escape" && !event.isComposing && stop());
at("ask").addEventListener("submit", (event) => (event.preventDefault(), submit()));
at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  logIn(at("token").value.trim());
  at("token").value = "";
});
at("stop").addEventListener("click", stop);
log.addEventListener("scroll", () => {
  if (log.clientHeight === heightThen) wasAtBottom = isAtBottom(); // else the observer comes next
});
new ResizeObserver(() => {
  heightThen = log.clientHeight;
  if (wasAtBottom) goToBottom(); // the box grows, a phone's keyboard opens
}).observe(log);
addEventListener("hashchange", route);
addEventListener("online", () => token && connect());
addEventListener("visibilitychange", () => token && !isReady && !document.hidden && connect());

route();
if (!token) {
  const kept = sessionStorage.getItem("anynode.token");
  if (kept) logIn(kept);
  else askForToken("");
}
