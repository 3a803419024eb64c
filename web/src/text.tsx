// Foreign text is shown as text: what cannot be seen, or turns the writing around, gets a visible name.

import { useState } from "preact/hooks";

// Joiners and variation selectors stand within letters and emoji, where they belong.
const HIDDEN = /((?![\t\n\u200d\ufe00-\ufe0f])[\p{Cc}\p{Cf}\p{Cs}\p{Default_Ignorable_Code_Point}\u2028\u2029])/gu;
const MOST = 4000;

const named = (char: string) => `U+${char.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}`;

// The same where only plain text can stand: titles, choices.
export const plain = (text: string) => text.replace(HIDDEN, (char) => `[${named(char)}]`);

export function Visible({ text }: { text: string }) {
  const pieces = text.split(HIDDEN);
  if (pieces.length === 1) return <>{text}</>;
  return (
    <>
      {pieces.map((piece, index) =>
        index % 2 ? (
          <span class="hidden-char" title="a character that cannot be seen">
            {named(piece)}
          </span>
        ) : (
          piece
        ),
      )}
    </>
  );
}

// A text of any length: a long one opens on demand.
export function Long({ text, most = MOST }: { text: string; most?: number }) {
  const [whole, open] = useState(false);
  if (text.length <= most * 1.1) return <div class="text"><Visible text={text} /></div>;
  return (
    <div class="text">
      <Visible text={whole ? text : text.slice(0, most)} />
      {!whole && "…"}
      <button class="more" onClick={() => open(!whole)}>
        {whole ? "show less" : `show all ${text.length.toLocaleString("en")} characters`}
      </button>
    </div>
  );
}

export function number(value: unknown, digits = 3): string {
  if (typeof value !== "number") return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: size >= 100 ? 1 : digits });
}

export const counted = (count: number, what: string) => `${number(count)} ${what}${count === 1 ? "" : "s"}`;

export const seconds = (value: unknown) =>
  typeof value === "number" && value > 0 && value < 0.01 ? "< 0.01 s" : `${number(value, 2)} s`;

export const signed = (value: number | null | undefined) =>
  typeof value === "number" ? `${value > 0 ? "+" : ""}${number(value)}` : "–";

export function duration(seconds: number | null | undefined): string {
  if (typeof seconds !== "number") return "–";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export function shown(value: unknown): string {
  return typeof value === "string" ? value : value === undefined ? "–" : JSON.stringify(value);
}

export function Copy({ label, text }: { label: string; text: () => string }) {
  const [done, set] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text());
      set("copied");
    } catch {
      set("the browser does not allow it");
    }
    setTimeout(() => set(""), 2000);
  };
  return (
    <button onClick={copy} aria-live="polite">
      {done || label}
    </button>
  );
}
