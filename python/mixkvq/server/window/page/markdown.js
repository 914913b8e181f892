// Markdown, block by block: what is finished stays as it is, only the last block is made anew when text comes.
import { TEXT } from "./text.js";

const md = window.markdownit({ html: false, linkify: true, breaks: false });
md.use(window.texmath, {
  engine: { renderToString: (tex, options) => window.temml.renderToString(tex, { ...options, throwOnError: false, trust: false }) },
  delimiters: ["dollars", "brackets", "beg_end"],
});
md.renderer.rules.fence = md.renderer.rules.code_block = (tokens, i) => {
  const language = (tokens[i].info || "").trim().split(/\s+/)[0];
  return `<pre data-language="${md.utils.escapeHtml(language)}"><code>${md.utils.escapeHtml(tokens[i].content)}</code></pre>`;
};
// Headings of a message stand below that of who says it, whatever the model takes them for.
md.renderer.rules.heading_open = (tokens, i) => `<h3 class="${tokens[i].tag}">`;
md.renderer.rules.heading_close = () => "</h3>\n";
const CLEAN = { USE_PROFILES: { html: true, mathMl: true }, ADD_ATTR: ["target"], FORBID_TAGS: ["style", "form", "input", "button", "textarea", "select"] };
const GROUP = 40; // blocks
const SLICE = 20000; // characters at a time, of a long text that is there already

window.DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

// A text as an element. finished: with colours and buttons, which a block gets once.
function block(text, finished) {
  const element = document.createElement("div");
  element.className = "block";
  element.dir = "auto";
  element.innerHTML = window.DOMPurify.sanitize(md.render(text), CLEAN);
  for (const part of element.querySelectorAll("p, li, ul, ol, h3, blockquote, td, th")) part.dir = "auto";
  for (const table of element.querySelectorAll("table")) scrolls(table);
  for (const pre of element.querySelectorAll("pre")) dress(pre, finished);
  for (const math of element.querySelectorAll('math[display="block"]')) math.setAttribute("tabindex", "0");
  return element;
}

function scrolls(table) {
  const frame = document.createElement("div");
  frame.className = "frame";
  frame.tabIndex = 0;
  frame.setAttribute("role", "group");
  table.replaceWith(frame);
  frame.append(table);
}

function dress(pre, finished) {
  const code = pre.firstElementChild;
  const language = pre.dataset.language;
  pre.dir = "ltr";
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", `${TEXT.code} ${language}`.trim());
  if (!finished) return;
  if (window.hljs.getLanguage(language) && code.textContent.length < SLICE * 5) {
    code.innerHTML = window.hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value;
  }
  const frame = document.createElement("div");
  frame.className = "code";
  const bar = document.createElement("div");
  bar.className = "row bar";
  const name = document.createElement("span");
  name.textContent = language;
  const copy = document.createElement("button");
  copy.textContent = TEXT.copy;
  copy.onclick = () => copied(copy, code.textContent);
  bar.append(name, copy);
  pre.replaceWith(frame);
  frame.append(bar, pre);
}

export async function copied(button, text) {
  await navigator.clipboard.writeText(text);
  button.textContent = TEXT.copied;
  setTimeout(() => (button.textContent = TEXT.copy), 1500);
}

// Where the last block of a text begins; 0 if there is one only.
function lastBlock(text) {
  const tokens = md.parse(text, {});
  let line = 0;
  for (const token of tokens) if (token.level === 0 && token.map && token.nesting >= 0) line = token.map[0];
  let at = 0;
  for (let i = 0; i < line; i++) at = text.indexOf("\n", at) + 1;
  return at;
}

// A text that grows, in an element.
export class Growing {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.waits = ""; // not rendered yet
    this.open = ""; // the last block
    this.last = null;
    this.whole = false;
    this.due = false;
    this.begin();
  }

  // Blocks are laid out by groups: the browser skips a group that is not seen, whatever is in it.
  begin() {
    this.group = document.createElement("div");
    this.group.className = "group";
    this.element.append(this.group);
  }

  add(text) {
    this.text += text;
    this.waits += text;
    this.soon();
  }

  end() {
    this.whole = true;
    this.soon();
  }

  soon() {
    if (this.due) return;
    this.due = true;
    // a window that is not seen has no frames
    if (document.hidden) setTimeout(() => this.draw(), 200);
    else requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.due = false;
    this.open += this.waits.slice(0, SLICE);
    this.waits = this.waits.slice(SLICE);
    const more = this.waits.length > 0;
    const at = lastBlock(this.open);
    const fresh = [];
    if (at) fresh.push(block(this.open.slice(0, at), true));
    this.open = this.open.slice(at);
    const finished = this.whole && !more;
    if (this.open.trim() || finished) fresh.push(block(this.open, finished));
    if (this.last) this.last.replaceWith(...fresh);
    else this.group.append(...fresh);
    this.last = this.open.trim() || finished ? fresh.at(-1) : null;
    if (this.group.childElementCount > GROUP) {
      this.begin();
      if (this.last) this.group.append(this.last);
    }
    if (more) this.soon();
    this.drawn?.();
  }
}

// A whole text, when it comes near the part of the page that is seen.
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      const text = entry.target.textContent;
      entry.target.replaceChildren();
      entry.target.classList.remove("raw");
      const growing = new Growing(entry.target);
      growing.add(text);
      growing.end();
    }
  },
  { rootMargin: "1000px" },
);

export function lazily(element, text) {
  element.textContent = text;
  element.classList.add("raw");
  seen.observe(element);
}
