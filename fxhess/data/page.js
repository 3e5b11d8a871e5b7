// Shows what is known of an operation beside the picture; without it, titles say the same.
(() => {
  const aside = document.querySelector(".fx-aside");
  let shown = null, pinned = false;
  const show = (card) => {
    const told = document.getElementById("step-" + card.dataset.step);
    if (!told || !aside) return;
    if (shown) shown.classList.remove("fx-on");
    shown = card;
    card.classList.add("fx-on");
    aside.replaceChildren(...[...told.children].map((child) => child.cloneNode(true)));
  };
  for (const card of document.querySelectorAll("[data-step]")) {
    card.addEventListener("mouseenter", () => { if (!pinned) show(card); });
    card.addEventListener("focus", () => show(card));
    card.addEventListener("click", () => { pinned = shown !== card || !pinned; show(card); });
  }
  const open = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const section = target && target.closest("details");
    if (section) { section.open = true; section.scrollIntoView({block: "start"}); }
  };
  window.addEventListener("hashchange", open);
  open();
})();
