// The panel of the cache: how full the context is, what is packed and what is F16, and what that takes.
import { by, make, button, guarded } from "./parts.js";
import { get } from "./server.js";
import { TEXT } from "./text.js";

let open = false;
let chat = null;

export async function toggle(number) {
  open = !open;
  by("panel").hidden = !open;
  by("cache").setAttribute("aria-expanded", open);
  await refresh(number);
}

// The figures of a chat, also for the line below the message.
export async function refresh(number) {
  chat = number;
  const f = await get(`chats/${number ?? 0}/cache`);
  if (chat !== number) return;
  by("figures").textContent = `${TEXT.ofContext(f.tokens, f.n_ctx)} · ${TEXT.mib(f.bytes)} (${TEXT.f16}: ${TEXT.mib(f.bytes_f16)})`;
  if (open) draw(f);
}

function gauge(name, value, all, ...parts) {
  const bar = make("div", { className: "gauge", role: "meter", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": all, "aria-valuenow": value });
  for (const [kind, n] of parts) {
    const part = make("div", { className: kind });
    part.style.width = `${(100 * n) / Math.max(1, all)}%`;
    bar.append(part);
  }
  return bar;
}

const row = (...cells) => make("tr", {}, ...cells.map((cell, i) => make(i ? "td" : "th", { textContent: cell, ...(i ? {} : { scope: "row" }) })));

function draw(f) {
  const share = f.all_tokens ? f.packed_tokens / f.all_tokens : 0;
  const packed = Math.round(f.tokens * share);
  const layers = make("div", { id: "layers", tabIndex: 0, role: "region", "aria-label": TEXT.layers });
  const fits = make("p", { className: "quiet", role: "status" });
  by("panel").replaceChildren(
    make("h2", { textContent: TEXT.context }),
    gauge(TEXT.context, f.tokens, f.n_ctx, ["packed", packed], ["f16", f.tokens - packed]),
    make("p", { className: "quiet", textContent: TEXT.ofContext(f.tokens, f.n_ctx) }),
    make("h2", { textContent: TEXT.held }),
    gauge(TEXT.held, f.all_tokens, f.n_ctx * f.streams.length, ["packed", f.packed_tokens], ["f16", f.f16_tokens]),
    make("p", { className: "quiet" }, make("span", { className: "key packed", textContent: TEXT.packed(f.packed_tokens) }), ", ", make("span", { className: "key f16", textContent: TEXT.recent(f.f16_tokens) })),
    make("h2", { textContent: TEXT.takes }),
    make("table", {}, make("tbody", {}, row(TEXT.here(f.bits), TEXT.mib(f.bytes)), row(TEXT.f16, TEXT.mib(f.bytes_f16)), row(TEXT.q8, TEXT.mib(f.bytes_q8_0)))),
    make("p", { className: "quiet", textContent: TEXT.files(f.parked, f.resumed) }),
    make("div", { className: "row" }, button(TEXT.layers, guarded(() => show(layers))), button(TEXT.howLong, guarded(() => long(fits)))),
    fits,
    layers,
  );
}

async function long(into) {
  into.textContent = TEXT.measuring;
  into.textContent = TEXT.fits(await get("fits"));
}

async function show(into) {
  const rows = (await get("layers")).map((l) =>
    row(
      `${l.layer} ${l.is_value ? TEXT.values : TEXT.keys}`,
      l.kind === "packed" ? l.body_bits.toFixed(2) : `16 (${TEXT.plain}: ${l.reason})`,
      l.is_value ? "" : l.tiers.join("/"),
      l.pages_packed,
      l.pages_f16,
      (l.bytes / 1048576).toFixed(2),
    ),
  );
  const head = make("tr", {}, ...TEXT.columns.map((name) => make("th", { textContent: name, scope: "col" })));
  into.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}
