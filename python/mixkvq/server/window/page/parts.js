// Elements of the page.
import { TEXT } from "./text.js";

export const by = (id) => document.getElementById(id);

// An element with properties, and what it holds.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export const button = (text, onclick, properties = {}) => make("button", { type: "button", textContent: text, onclick, ...properties });

// The texts that the HTML asks for.
export function label() {
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = TEXT[element.dataset.text];
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", TEXT[element.dataset.label]);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = TEXT[element.dataset.hint];
}

// For those who listen instead of looking.
export function say(text) {
  by("said").textContent = text;
}

export function note(text, bad = false) {
  const line = make("p", { textContent: text, className: bad ? "bad" : "" });
  line.append(" ", button(TEXT.close, () => line.remove()));
  by("notes").append(line);
  return line;
}

// What fails is said.
export const guarded = (what) => async (...given) => {
  try {
    return await what(...given);
  } catch (e) {
    note(e.message, true);
  }
};

// A dialog; done(form) is called when it is confirmed.
export function dialog(title, content, confirm, done) {
  const frame = by("dialog");
  const form = make("form", { method: "dialog" }, make("h2", { id: "dialog-title", textContent: title }), ...content);
  const row = make("div", { className: "row" }, button(confirm ? TEXT.cancel : TEXT.close, () => frame.close()));
  if (confirm) row.append(make("button", { className: "strong", textContent: confirm }));
  form.append(row);
  form.onsubmit = guarded(async (e) => {
    e.preventDefault();
    await done(form);
    frame.close();
  });
  frame.replaceChildren(form);
  frame.showModal();
}
