// Read after jupyter_rfb's own script, whose two classes it changes: one message to the kernel for each picture.
// A mouse moves 60 times a second and more, and JupyterLab works for each message, also for the kernel's "busy" and
// "idle" about it. So the last move waits until a picture has come, and it carries the word that the picture came.
if (typeof AnywidgetRenderView !== "undefined" && typeof RendercanvasAnywidgetModel !== "undefined") {
  const View = AnywidgetRenderView.prototype;
  const Model = RendercanvasAnywidgetModel.prototype;
  const send = View.onEvent;
  const respond = Model._send_response;
  const AHEAD = 2; // moves that may be on their way
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
      send.call(this, event);
    }
  };

  Model.keepMove = function (event) {
    this.move = event;
    if (performance.now() - (this.sentAt ?? 0) > PATIENCE) this.ahead = 0;
    if ((this.ahead ?? 0) < AHEAD) this.sendMove();
    else this.timer ??= window.setTimeout(() => this.sendMove(), PATIENCE);
  };

  Model.sendMove = function () {
    window.clearTimeout(this.timer);
    this.timer = undefined;
    if (!this.move) return false;
    const { index, timestamp } = this._lastFrame;
    this.anymodel.send({ move: this.move, seen: { index, timestamp, localtime: Date.now() / 1000 } });
    this.move = null;
    this.sentAt = performance.now();
    this.ahead = (this.ahead ?? 0) + 1;
    return true;
  };

  Model._send_response = function () {
    this.ahead = Math.max((this.ahead ?? 0) - 1, 0);
    if (!this.sendMove()) respond.call(this);
  };
}
