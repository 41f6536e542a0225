// Inflates Plotly and the figures, which stand in the page as base64 of gzip, and draws them.
const inflate = async (id) => {
  const packed = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
};

const draw = async () => {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser is too old: it takes Chrome 80, Firefox 113, Safari 16.4 or newer");
  }
  const script = document.createElement("script");
  script.textContent = await inflate("plotly");
  document.head.append(script);
  const page = JSON.parse(await inflate("figures"));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displaylogo: false };
  const paint = async () => {
    const template = dark.matches ? page.dark : page.light;
    for (const [i, figure] of page.figures.entries()) {
      const layout = structuredClone({ ...figure.layout, template });
      await Plotly.react(`figure-${i}`, figure.data, layout, config);
    }
    document.body.dataset.drawn = dark.matches ? "dark" : "light";
  };
  await paint();
  dark.addEventListener("change", paint);
};

draw().catch((error) => {
  document.getElementById("problem").textContent = `The figures cannot be drawn: ${error.message}.`;
  console.error(error);
});
