// The place in the window is the part of the address after "#": pages can be linked, and "back" works.

import { useEffect, useState } from "preact/hooks";

export interface Route {
  parts: string[];
  query: URLSearchParams;
}

function read(): Route {
  const [place = "", query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const parts = place.split("/").filter(Boolean).map(decoded);
  return { parts, query: new URLSearchParams(query) };
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export function useRoute(): Route {
  const [route, set] = useState(read);
  useEffect(() => {
    const moved = () => set(read());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  return route;
}

export function href(parts: (string | number)[], query?: Record<string, string> | URLSearchParams): string {
  const words = new URLSearchParams(query).toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${words && `?${words}`}`;
}

// Changes the query; an empty value takes the name away. Typing does not fill the history.
export function change(route: Route, changes: Record<string, string>, replace = false): void {
  const query = new URLSearchParams(route.query);
  for (const [name, value] of Object.entries(changes)) value ? query.set(name, value) : query.delete(name);
  const address = href(route.parts, query);
  if (!replace) location.hash = address;
  else {
    history.replaceState(null, "", address);
    dispatchEvent(new HashChangeEvent("hashchange"));
  }
}
