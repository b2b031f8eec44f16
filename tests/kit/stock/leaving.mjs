// What a user writes to leave a node that is frozen; docs/clients.md has it.

export { LeavingWebSocket };

const silenceMs = 2000; // two heartbeats of the nodes here

class LeavingWebSocket extends WebSocket {
  constructor(...parameters) {
    super(...parameters);
    const leave = () => {
      this.onclose?.({ code: 1006 }); // a frozen node answers no closing handshake
      this.close();
    };
    let silence = setTimeout(leave, silenceMs);
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(leave, silenceMs);
    };
    this.addEventListener('message', heard);
    this.addEventListener('close', () => clearTimeout(silence));
  }
}
