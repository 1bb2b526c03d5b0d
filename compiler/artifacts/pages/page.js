"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const now = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const name = () => {
    const other = now() === "dark" ? "Light" : "Dark";
    button.textContent = other;
    button.setAttribute("aria-label", `Show in ${other.toLowerCase()} colours`);
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = now() === "dark" ? "light" : "dark";
    name();
  });
  dark.addEventListener("change", name);
  name();

  const tip = document.getElementById("tip");
  const text = (at) => {
    const found = at.closest("[data-tip], .drawing [aria-label]:not(.drawing)");
    return found ? found.dataset.tip || found.getAttribute("aria-label") : "";
  };
  const hide = () => { tip.hidden = true; };
  const show = (event) => {
    const said = event.target instanceof Element ? text(event.target) : "";
    if (!said) return hide();
    tip.textContent = said;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, event.clientX - box.width / 2), innerWidth - box.width - 8);
    const above = event.clientY - box.height - 14;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 8 ? event.clientY + 18 : above}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("pointerleave", hide);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = links.get(entry.target.id);
      if (!entry.isIntersecting || !link) continue;
      for (const other of links.values()) other.removeAttribute("aria-current");
      link.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  for (const section of document.querySelectorAll("main section")) seen.observe(section);
})();
