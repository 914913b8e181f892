// The window: the list of chats, the message that is being written, dialogs.
import * as panel from "./panel.js";
import { by, button, dialog, guarded, label, make, note, say } from "./parts.js";
import { get, post, remove, send } from "./server.js";
import { TEXT } from "./text.js";
import { View } from "./view.js";

const LARGEST_FILE = 1 << 20;
let about = null;
let current = null; // number of the chat that is open
let files = [];
let asked = 0; // how often the list was
const view = new View(guarded(async (listed) => {
  if (listed) await list();
  await panel.refresh(current);
}));

async function list() {
  const words = by("search").value.trim();
  const mine = ++asked; // of two answers the one to the later question counts
  const rows = words ? await get(`search?q=${encodeURIComponent(words)}`) : await get("chats");
  if (mine !== asked) return;
  const items = rows.map((row) => {
    const number = row.chat ?? row.id;
    const open = guarded(async () => {
      if (row.message) await post(`messages/${row.message}/show`);
      await go(number);
      if (row.message) document.querySelector(`[data-id="${row.message}"]`)?.scrollIntoView({ block: "center" });
    });
    const entry = button(row.title || TEXT.untitled, open, { dir: "auto", title: row.title, "aria-current": number === current });
    if (words && row.message) entry.append(make("small", { textContent: row.around }));
    return make("li", {}, entry);
  });
  if (words && !items.length) items.push(make("li", { className: "quiet", textContent: TEXT.nothingFound }));
  by("list").replaceChildren(...items);
}

async function go(number) {
  current = number;
  history.replaceState(null, "", number == null ? "#" : `#${number}`);
  await view.open(number);
  titled();
  await list();
  await panel.refresh(number);
}

function titled() {
  const title = view.chat?.title || TEXT.untitled;
  by("title").textContent = title;
  document.title = `${title} · ${about.model}`;
  for (const id of ["settings", "export", "delete"]) by(id).disabled = current == null && id !== "settings";
  by("empty").textContent = about.private ? `${TEXT.empty} ${TEXT.private}` : TEXT.empty;
}

// Messages are written into a chat that exists.
async function chat() {
  if (current == null) await go((await post("chats")).id);
}

const submit = guarded(async () => {
  const content = by("input").value;
  if (view.running || !(content.trim() || files.length)) return;
  await chat();
  by("notes").replaceChildren();
  await view.say(content, files);
  by("input").value = "";
  files = [];
  attached();
  grow();
  titled();
});

function grow() {
  by("input").style.height = "auto";
  by("input").style.height = `${by("input").scrollHeight + 2}px`;
}

function attached() {
  const drop = (file) => () => {
    files = files.filter((other) => other !== file);
    attached();
  };
  by("files").replaceChildren(...files.map((f) => make("li", {}, button(`${f.name} ×`, drop(f), { "aria-label": TEXT.remove(f.name) }))));
}

async function attach(chosen) {
  for (const file of chosen) {
    if (file.size > LARGEST_FILE) note(TEXT.tooLarge(file.name), true);
    else {
      try {
        const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
        if (text.includes("\0")) throw new TypeError();
        files.push({ name: file.name, text });
      } catch {
        note(TEXT.notText(file.name), true);
      }
    }
  }
  attached();
  by("input").focus();
}

const settings = guarded(async () => {
  await chat();
  const field = (name, text, input) => {
    input.id = `set-${name}`;
    return [make("label", { htmlFor: input.id, textContent: text }), input];
  };
  const chosen = view.chat.settings;
  const numbers = Object.entries(TEXT.sampling).map(([name, text]) =>
    make("div", {}, ...field(name, text, make("input", { type: "number", step: "any", value: chosen[name] ?? "", placeholder: about.sampling[name] ?? "" }))),
  );
  const ends = Object.entries(TEXT.ends).map(([value, text]) =>
    make("label", {}, make("input", { type: "radio", name: "at_end", value, checked: value === (chosen.at_end ?? "stop") }), text),
  );
  const content = [
    ...field("title", TEXT.title, make("input", { value: view.chat.title, dir: "auto" })),
    ...field("system", TEXT.system, make("textarea", { rows: 3, value: view.chat.system, dir: "auto" })),
    make("div", { className: "fields" }, ...numbers),
    make("fieldset", {}, make("legend", { textContent: TEXT.atEnd }), ...ends),
  ];
  dialog(TEXT.settings, content, TEXT.save, async (form) => {
    const wanted = { at_end: form.elements.at_end.value };
    for (const name of Object.keys(TEXT.sampling)) {
      const value = by(`set-${name}`).value;
      if (value !== "") wanted[name] = Number(value);
    }
    await post(`chats/${current}`, { title: by("set-title").value, system: by("set-system").value, settings: wanted });
    await view.again();
    titled();
    await list();
  });
});

function exports() {
  const links = Object.entries(TEXT.forms).map(([form, text]) =>
    make("a", { href: `/window/chats/${current}/export?format=${form}`, download: "", textContent: text }),
  );
  dialog(TEXT.exportAs, links);
}

function deletes() {
  dialog(TEXT.delete, [make("p", { textContent: TEXT.deleteThis(view.chat.title || TEXT.untitled) })], TEXT.delete, async () => {
    const gone = current;
    view.leave();
    await remove(`chats/${gone}`);
    await go(null);
  });
}

const imports = guarded(async (file) => {
  const { chats } = await send("import", await file.text());
  await go(chats[0]);
});

function theme() {
  const choice = by("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  choice.replaceChildren(...Object.entries(TEXT.themes).map(([value, text]) => make("option", { value, textContent: text })));
  choice.value = localStorage.getItem("theme") ?? "system";
  const set = () => {
    document.documentElement.dataset.theme = choice.value === "system" ? (dark.matches ? "dark" : "light") : choice.value;
  };
  choice.onchange = () => {
    localStorage.setItem("theme", choice.value);
    set();
  };
  dark.addEventListener("change", set);
  set();
}

function wire() {
  by("new").onclick = guarded(async () => {
    await go(null);
    by("input").focus();
  });
  by("composer").onsubmit = (e) => {
    e.preventDefault();
    submit();
  };
  by("input").onkeydown = (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
      e.preventDefault();
      submit();
    }
  };
  by("input").oninput = grow;
  by("stop").onclick = guarded(() => view.stop());
  document.addEventListener("keydown", (e) => {
    if (e.key === "Escape" && view.running && !by("dialog").open) guarded(() => view.stop())();
  });
  by("attach").onclick = () => by("attach-file").click();
  by("attach-file").onchange = (e) => attach([...e.target.files]).then(() => (e.target.value = ""));
  document.addEventListener("dragover", (e) => e.preventDefault());
  document.addEventListener("drop", (e) => {
    e.preventDefault();
    attach([...e.dataTransfer.files]);
  });
  by("search").oninput = guarded(list);
  by("import").onclick = () => by("import-file").click();
  by("import-file").onchange = (e) => imports(e.target.files[0]).then(() => (e.target.value = ""));
  by("settings").onclick = settings;
  by("export").onclick = exports;
  by("delete").onclick = deletes;
  by("cache").onclick = guarded(() => panel.toggle(current));
  by("menu").onclick = () => {
    by("side").hidden = !by("side").hidden;
    by("menu").setAttribute("aria-expanded", !by("side").hidden);
  };
  // another window may have changed them
  addEventListener("focus", guarded(list));
}

guarded(async () => {
  label();
  theme();
  wire();
  about = await get("about");
  const wanted = Number(location.hash.slice(1)) || null;
  const chats = await get("chats");
  await go(chats.some((c) => c.id === wanted) ? wanted : null);
  by("input").focus();
  say("");
})();
