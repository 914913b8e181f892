// The conversation: the branch of the tree that is shown, and answers as they come.
import { Growing, copied, lazily } from "./markdown.js";
import { by, button, guarded, make, note, say } from "./parts.js";
import { get, listen, post } from "./server.js";
import { TEXT } from "./text.js";

export class View {
  // changed: called when the tree or an answer has changed
  constructor(changed) {
    this.changed = changed;
    this.chat = null;
    this.opened = 0; // how many times a chat was
    this.running = null; // {id, close} of the answer that is being written here
    this.follows = true;
    const scroll = by("scroll");
    scroll.addEventListener("scroll", () => {
      this.follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
    });
  }

  async open(number) {
    this.leave();
    const mine = ++this.opened;
    const chat = number == null ? null : await get(`chats/${number}`);
    if (mine !== this.opened) return; // another one was opened meanwhile
    this.chat = chat;
    this.follows = true;
    this.draw();
  }

  // The same chat, after something has changed.
  async again() {
    if (this.chat) this.chat = await get(`chats/${this.chat.id}`);
    this.leave();
    this.draw();
  }

  leave() {
    this.running?.close();
    this.running = null;
    this.buttons();
  }

  shown() {
    const found = [];
    const messages = new Map((this.chat?.messages ?? []).map((m) => [m.id, m]));
    for (let at = this.chat?.shown; at != null && messages.has(at); at = messages.get(at).shown) found.push(messages.get(at));
    return found;
  }

  last() {
    return this.shown().at(-1)?.id ?? null;
  }

  buttons() {
    by("send").hidden = this.running != null;
    by("stop").hidden = this.running == null;
  }

  draw() {
    const shown = this.shown();
    by("log").replaceChildren(...shown.map((m) => this.item(m)));
    by("empty").hidden = shown.length > 0;
    this.bottom();
  }

  bottom() {
    if (this.follows) by("scroll").scrollTop = by("scroll").scrollHeight;
  }

  item(m) {
    const who = m.role === "user" ? TEXT.you : (m.figures.model ?? TEXT.assistant);
    const item = make("li", { className: m.role }, make("h2", { className: "who", textContent: who }));
    item.dataset.id = m.id;
    item.dataset.state = m.state;
    const body = make("div", { className: "body" });
    const tools = make("div", { className: "row tools" });
    if (m.role === "user") body.tabIndex = 0, body.setAttribute("role", "group"), body.setAttribute("aria-label", TEXT.you);
    for (const file of m.files) body.append(make("details", { className: "file" }, make("summary", { textContent: file.name }), make("pre", { textContent: file.text, tabIndex: 0, dir: "auto" })));
    item.append(body, tools);
    if (m.state === "running") {
      this.follow(m, item, body, tools);
      return item;
    }
    if (m.reasoning) body.append(thoughts(m.reasoning, m.figures.thought_s));
    const text = make("div", { dir: "auto" });
    lazily(text, m.content);
    body.append(text);
    this.finish(m, body, tools);
    return item;
  }

  // Tools and remarks of a message that is complete.
  finish(m, body, tools) {
    const remarks = [];
    if (m.state in TEXT.states) remarks.push(m.state === "failed" ? TEXT.states.failed(m.figures.error) : TEXT.states[m.state]);
    if (m.figures.reason === "full") remarks.push(TEXT.full);
    if (m.figures.reason === "limit") remarks.push(TEXT.limit);
    if (m.figures.dropped) remarks.push(TEXT.dropped(m.figures.dropped));
    for (const remark of remarks) body.append(make("p", { className: "quiet remark", textContent: remark }));
    const siblings = this.chat.messages.filter((other) => other.parent === m.parent && other.role === m.role);
    if (siblings.length > 1) {
      const i = siblings.findIndex((other) => other.id === m.id);
      const to = (j) => guarded(async () => {
        await post(`messages/${siblings[j].id}/show`);
        this.follows = false;
        await this.again();
      });
      tools.append(
        button("‹", to(i - 1), { disabled: i === 0, "aria-label": TEXT.previous }),
        make("span", { textContent: TEXT.versions(i + 1, siblings.length) }),
        button("›", to(i + 1), { disabled: i === siblings.length - 1, "aria-label": TEXT.next }),
      );
    }
    const copy = button(TEXT.copy, () => copied(copy, m.content));
    tools.append(copy);
    if (m.role === "user") tools.append(button(TEXT.edit, () => this.edit(m, body, tools)));
    else tools.append(button(TEXT.again, guarded(() => this.answer(m.parent))));
    if (m.figures.predicted_n) tools.append(make("span", { className: "speed", textContent: `${TEXT.speed(m.figures)} · ${TEXT.began(m.figures)}` }));
  }

  edit(m, body, tools) {
    const field = make("textarea", { className: "editor", value: m.content, dir: "auto", "aria-label": TEXT.edit });
    const done = guarded(async () => {
      await this.say(field.value, m.files, m.parent);
    });
    tools.replaceChildren(button(TEXT.cancel, () => this.draw()), button(TEXT.send, done, { className: "strong" }));
    body.replaceChildren(field);
    field.focus();
  }

  // The user says something behind a message; undefined: behind the last one.
  async say(content, files = [], parent = this.last()) {
    await post(`chats/${this.chat.id}/messages`, { content, files, parent });
    this.follows = true;
    await this.again();
    this.changed(true);
  }

  async answer(question) {
    await post(`messages/${question}/answer`);
    this.follows = true;
    await this.again();
    this.changed(true);
  }

  async stop() {
    if (this.running) await post(`messages/${this.running.id}/stop`);
  }

  // An answer as it comes.
  follow(m, item, body, tools) {
    let folded = null;
    let text = null;
    let ticking = null;
    const thinks = () => {
      if (folded) return folded;
      const began = performance.now();
      const inner = make("div", { dir: "auto" });
      const summary = make("summary", { textContent: TEXT.thinking });
      body.append(make("details", {}, summary, inner));
      ticking = setInterval(() => (summary.textContent = TEXT.thought((performance.now() - began) / 1000)), 500);
      folded = new Growing(inner);
      folded.drawn = () => this.bottom();
      return folded;
    };
    const answers = () => {
      if (text) return text;
      clearInterval(ticking);
      const inner = make("div", { dir: "auto" });
      body.append(inner);
      text = new Growing(inner);
      text.drawn = () => this.bottom();
      return text;
    };
    const progress = make("p", { className: "quiet" });
    const bar = make("progress", { "aria-label": TEXT.reading(0, 0) });
    const read = make("span");
    item.setAttribute("aria-busy", "true");
    say(TEXT.answering);
    let lost = null;
    const hear = (event) => {
      if (event.type === "lost") lost ??= note(TEXT.lost, true);
      else if (event.type === "start") {
        lost?.remove();
        lost = null;
        body.querySelectorAll(":scope > :not(details.file)").forEach((e) => e.remove());
        folded = text = null;
        if (event.reasoning) thinks().add(event.reasoning);
        if (event.content) answers().add(event.content);
      } else if (event.type === "progress") {
        if (text || folded) return;
        if (event.processed < event.total) {
          bar.max = event.total;
          bar.value = event.processed;
          read.textContent = TEXT.reading(event.processed, event.total);
          progress.replaceChildren(bar, " ", read);
          body.append(progress);
        } else progress.remove();
      } else if (event.type === "note") {
        const said = event.kind === "dropped" ? TEXT.dropped(Number(event.text)) : event.text;
        note(said, event.kind === "unsaved");
      } else if (event.type === "reasoning") thinks().add(event.text);
      else if (event.type === "content") progress.remove(), answers().add(event.text);
      else if (event.type === "end") {
        clearInterval(ticking);
        progress.remove();
        folded?.end();
        text?.end();
        const summary = body.querySelector("summary");
        if (summary && folded) summary.textContent = TEXT.thought(event.figures.thought_s);
        Object.assign(m, { state: event.state, figures: event.figures, content: text?.text ?? "", reasoning: folded?.text ?? "" });
        item.dataset.state = m.state;
        item.removeAttribute("aria-busy");
        this.finish(m, body, tools);
        this.running = null;
        this.buttons();
        this.bottom();
        say(TEXT.answered);
        this.changed(false);
      }
    };
    this.running = { id: m.id, close: listen(m.id, hear) };
    this.buttons();
  }
}

function thoughts(text, seconds) {
  const inner = make("div", { dir: "auto" });
  const details = make("details", {}, make("summary", { textContent: TEXT.thought(seconds) }), inner);
  details.addEventListener("toggle", () => lazily(inner, text), { once: true });
  return details;
}
