// The work of scripts/audit_page.sh, which says what it is.
"use strict";
const { mkdirSync, readFileSync } = require("node:fs");
const { basename, resolve } = require("node:path");
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

async function audit(browser, file, folder, width, colorScheme) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme, bypassCSP: true });
  const page = await context.newPage();
  const found = [];
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && found.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => found.push(`error: ${error.message}`));
  page.on("request", (request) => request.url().startsWith("file:") || found.push(`asked for ${request.url()}`));
  await page.goto(`file://${resolve(file)}`);
  await page.waitForTimeout(1000);
  found.push(...(await page.evaluate(() => [...document.querySelectorAll(".chart")]
    .filter((place) => !place.querySelector("svg path")).map((place) => `not drawn: ${place.getAttribute("aria-label")}`))));
  found.push(...(await page.evaluate(() => {
    // A map whose scale does not fit its values is of one color. Its cells are the rectangles of the same size.
    const texts = JSON.parse(document.getElementById("charts").textContent);
    return [...document.querySelectorAll(".chart")].flatMap((place) => {
      const chart = texts[place.dataset.chart];
      if (chart.kind !== "heatmap") return [];
      const values = chart.values.flat().filter((value) => value !== null);
      const most = (items) => Math.max(...Map.groupBy(items, (item) => item).values().map((group) => group.length)) / items.length;
      const fills = [...place.querySelectorAll("svg path[fill]")].map((path) => path.getAttribute("fill")).filter((fill) => fill.startsWith("rgb"));
      return fills.length >= values.length && most(fills) > 0.5 && most(values) <= 0.5 ? [`of one color: ${place.getAttribute("aria-label")}`] : [];
    });
  })));
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (wide > 0) found.push(`${wide} pixels wider than the screen`);
  const stem = `${folder}/${basename(file, ".html")}_${width}_${colorScheme}`;
  await page.screenshot({ path: `${stem}.png`, fullPage: true });
  await page.evaluate(() => document.querySelectorAll("details").forEach((details) => (details.open = true)));
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run());
  for (const { id, impact, help, nodes } of violations) {
    found.push(`axe ${id} (${impact}): ${help}: ${nodes.slice(0, 3).map((node) => node.target).join("; ")}`);
  }
  await context.close();
  return found.map((text) => `${basename(file)}, ${width} px, ${colorScheme}: ${text}`);
}

(async () => {
  const [folder, ...files] = process.argv.slice(2);
  mkdirSync(folder, { recursive: true });
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"], timeout: 120_000 });
  const found = [];
  for (const file of files) {
    for (const width of [1280, 390]) {
      for (const scheme of ["light", "dark"]) found.push(...(await audit(browser, file, folder, width, scheme)));
    }
    const page = await browser.newPage();
    await page.setViewportSize({ width: 794, height: 1123 }); // A4
    await page.goto(`file://${resolve(file)}`);
    await page.emulateMedia({ media: "print", colorScheme: "dark" });
    await page.waitForTimeout(1000);
    await page.screenshot({ path: `${folder}/${basename(file, ".html")}_printed.png`, fullPage: true });
    await page.emulateMedia({ media: null, colorScheme: null });
    await page.pdf({ path: `${folder}/${basename(file, ".html")}.pdf`, format: "A4" });
    await page.close();
  }
  await browser.close();
  console.log(found.join("\n") || `${files.length} pages: nothing found`);
  process.exit(found.length ? 1 : 0);
})();
