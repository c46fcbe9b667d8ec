// Read after jupyter_rfb's own script, whose two classes it changes: one message to the kernel for each picture.
// A mouse moves 60 times a second and more, and JupyterLab works for each message, also for the kernel's "idle" about
// it. So the last move waits until a picture has come, and it carries the word that the picture came.
if (typeof AnywidgetRenderView !== "undefined" && typeof RendercanvasAnywidgetModel !== "undefined") {
  const View = AnywidgetRenderView.prototype;
  const Model = RendercanvasAnywidgetModel.prototype;
  const send = View.onEvent;
  const respond = Model._send_response;
  const animate = Model._animate;
  const AHEAD = 3; // moves that may be on their way: one comes, one is drawn, one is shown
  const PATIENCE = 150; // milliseconds, then a move is sent without an answer to those before it

  View.setThrottle = function (milliseconds) {
    this._wheelThrottle = milliseconds;
    this._moveThrottle = 0;
  };

  View.onEvent = function (event) {
    if (event.type === "pointer_move") {
      if (event.buttons.length) this.model.keepMove(event); // without a button nothing turns
    } else {
      this.model.sendMove();
      this.model.answer();
      send.call(this, event);
    }
  };

  Model.number = 0; // of the last move that was sent
  Model.drawn = 0; // of the last one that a picture shows: the kernel draws several at once when it is slow

  Model.keepMove = function (event) {
    this.move = event;
    const late = performance.now() - (this.sentAt ?? 0) > PATIENCE;
    if (late || this.number - this.drawn < AHEAD) this.sendMove();
    else this.timer ??= window.setTimeout(() => this.sendMove(), PATIENCE);
  };

  Model.sendMove = function () {
    window.clearTimeout(this.timer);
    this.timer = undefined;
    if (!this.move) return false;
    const { index, timestamp } = this._lastFrame;
    this.number += 1;
    const seen = { index, timestamp, localtime: Date.now() / 1000 };
    this.anymodel.send({ move: this.move, number: this.number, seen });
    this.move = null;
    this.sentAt = performance.now();
    this.noAnswer();
    return true;
  };

  Model.noAnswer = function () {
    window.clearTimeout(this.answerTimer);
    this.answerTimer = undefined;
  };

  Model.answer = function () {
    if (this.answerTimer === undefined) return;
    this.noAnswer();
    respond.call(this);
  };

  Model._send_response = function () {
    this.drawn = this._lastFrame.move ?? this.number;
    if (this.number - this.drawn < AHEAD && this.sendMove()) return;
    // In a drag the next move follows at once, and takes the word with it.
    const dragged = performance.now() - (this.sentAt ?? -PATIENCE) < PATIENCE;
    this.answerTimer ??= window.setTimeout(() => this.answer(), dragged ? 50 : 0);
  };

  // A picture of a drag becomes text: through the address of a blob, a browser loads it as if it were far away.
  Model._animate = function () {
    const frame = this._frames[0];
    if (frame?.mimetype === "image/jpeg" && frame.buffers.length) {
      const { buffer, byteOffset, byteLength } = frame.buffers[0];
      frame.data_b64 = `data:image/jpeg;base64,${base64(new Uint8Array(buffer, byteOffset, byteLength))}`;
      frame.buffers = [];
    }
    animate.call(this);
  };

  function base64(bytes) {
    if (bytes.toBase64) return bytes.toBase64();
    const parts = [];
    for (let k = 0; k < bytes.length; k += 8192) parts.push(String.fromCharCode(...bytes.subarray(k, k + 8192)));
    return btoa(parts.join(""));
  }
}
