// `eco_train watch`: ask now and then whether there is anything new, and put it in place of the old without a flash.
(() => {
  const badge = document.getElementById("live");
  const openOnes = () => [...document.querySelectorAll("#page details")].map((d) => d.open);
  const scrolled = () => [...document.querySelectorAll("#page .scroll")].map((d) => d.scrollLeft);
  const turn = async () => {
    const page = document.getElementById("page");
    try {
      const answer = await fetch("/", { headers: { "If-None-Match": page.dataset.version }, cache: "no-store" });
      badge.className = "";
      badge.textContent = "live";
      if (answer.status === 200) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("page");
        const open = openOnes(), across = scrolled();
        if (!document.querySelector("#page .tip")) {  // do not take a value away that is being read
          page.replaceWith(fresh);
          const now = [...document.querySelectorAll("#page details")];
          if (now.length === open.length) now.forEach((d, i) => { d.open = open[i]; });
          document.querySelectorAll("#page .scroll").forEach((d, i) => { d.scrollLeft = across[i] || 0; });
        }
      }
    } catch {
      badge.className = "ended";
      badge.textContent = "eco_train watch has ended; this is what it showed last";
    }
    setTimeout(turn, document.hidden ? 10000 : 2000);
  };
  setTimeout(turn, 2000);
})();
